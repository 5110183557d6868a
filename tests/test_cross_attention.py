"""Every case x dtype x implementation, forward and backward, under the one ruler."""

from __future__ import annotations

import functools

import pytest
import torch

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, LAYOUTS, Case, functional_cases, make_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@functools.lru_cache(maxsize=1024)
def _truth(name: str, dtype: torch.dtype) -> tolerance.Truth:
    return tolerance.truth(make_inputs(CROSS_ATTENTION[name], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", [case.name for case in functional_cases()])
def test_case(name, dtype, implementation):
    against = _truth(name, dtype)
    results = tolerance.run(mmfast.cross_attention, against.inputs)
    tolerance.assert_accurate(results, against)


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("name", ["vqa", "caption", "qformer", "align", "pool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_performance_shape(name, ragged, dtype, backend):
    """The shapes that are timed, at their real head count and widths, for two items."""
    full = CROSS_ATTENTION[f"{name}_ragged" if ragged else name]
    lens = None if full.kv_lens is None else (full.kv_lens[0], full.kv_lens[-1])
    case = Case(full.name, 2, full.H, full.N, full.M, full.D, kv_lens=lens, layout=full.layout)
    against = tolerance.truth(make_inputs(case, dtype))
    tolerance.assert_accurate(tolerance.run(mmfast.cross_attention, against.inputs), against)


@pytest.mark.parametrize("name", [f"layout_{layout}" for layout in LAYOUTS] + ["layout_mixed"])
def test_memory_of_the_results_follows_the_inputs(name, implementation):
    inputs = make_inputs(CROSS_ATTENTION[name], torch.float32)
    q = inputs.q
    results = tolerance.run(mmfast.cross_attention, inputs)
    out = results["out"]
    straight = out.transpose(1, 2) if q.stride(1) < q.stride(2) else out
    assert straight.is_contiguous()
    assert results["lse"].is_contiguous()


def test_only_what_was_asked_for(implementation):
    inputs = make_inputs(CROSS_ATTENTION["dense"], torch.float32)
    q, k, v = inputs.q, inputs.k, inputs.v
    out = mmfast.cross_attention(q, k, v)
    assert isinstance(out, torch.Tensor)
    flags = {"lse": "return_lse", "importance": "return_importance", "weights": "return_weights"}
    for name, flag in flags.items():
        result = mmfast.cross_attention(q, k, v, **{flag: True})
        assert isinstance(result, mmfast.CrossAttentionOutput)
        assert torch.equal(result.out, out)
        there = {part for part in result._fields if getattr(result, part) is not None}
        assert there == {"out", name}


def test_weights_forms(implementation):
    inputs = make_inputs(CROSS_ATTENTION["gqa_2"], torch.float32)

    def weights(form):
        return mmfast.cross_attention(
            inputs.q, inputs.k, inputs.v, return_weights=form, kv_lens=torch.tensor([33, 5])
        ).weights

    assert torch.equal(weights(True), weights("mean"))
    torch.testing.assert_close(weights("per_head").mean(1), weights("mean"))
    torch.testing.assert_close(weights("mean").sum(-1), torch.ones(2, 17))


def test_weights_and_importance_do_not_depend_on_dropout_and_gate(implementation):
    inputs = make_inputs(CROSS_ATTENTION["dense"], torch.float32)
    asked = {"return_lse": True, "return_importance": True, "return_weights": True}
    plain = mmfast.cross_attention(inputs.q, inputs.k, inputs.v, **asked)
    gate = torch.randn(2, 37, 3)
    other = mmfast.cross_attention(inputs.q, inputs.k, inputs.v, gate=gate, dropout_p=0.5, **asked)
    assert not torch.equal(plain.out, other.out)
    for name in ("lse", "importance", "weights"):
        assert torch.equal(getattr(plain, name), getattr(other, name))


@pytest.mark.parametrize("integers", [torch.int64, torch.int16, torch.int8, torch.uint8])
def test_any_integer_dtype(integers, implementation):
    inputs = make_inputs(CROSS_ATTENTION["segments_lens"], torch.float32)
    names = ("kv_lens", "q_segments", "kv_segments")
    rows = inputs.options["q_segments"].clamp(min=0)
    options = {**inputs.options, "q_segments": rows}
    options["kv_lens"] = options["kv_lens"].clamp(max=127)
    converted = {name: options[name].to(integers) for name in names}
    expected = mmfast.cross_attention(inputs.q, inputs.k, inputs.v, **options)
    got = mmfast.cross_attention(inputs.q, inputs.k, inputs.v, **{**options, **converted})
    assert torch.equal(got, expected)


def test_the_dropout_seed_comes_from_torch(implementation):
    inputs = make_inputs(CROSS_ATTENTION["dropout"], torch.float32)

    def draw():
        return mmfast.cross_attention(inputs.q, inputs.k, inputs.v, dropout_p=0.3)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)


def test_the_reference_draws_the_same_mask_from_a_given_seed(backend):
    inputs = make_inputs(CROSS_ATTENTION["dropout_odd"], torch.float64)
    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (1,))
    torch.manual_seed(5)
    got = mmfast.cross_attention(inputs.q, inputs.k, inputs.v, dropout_p=0.5)
    for form in (seed, int(seed)):
        expected = mmfast.reference.cross_attention(
            inputs.q, inputs.k, inputs.v, dropout_p=0.5, dropout_seed=form
        )
        torch.testing.assert_close(got, expected)


def test_causal_alignment():
    """Bottom right: the last row sees the last key, whatever N and M."""
    for N, M in ((3, 5), (5, 3), (4, 4)):
        q, k = torch.zeros(1, 1, N, 8), torch.zeros(1, 1, M, 8)
        result = mmfast.cross_attention(q, k, k, is_causal=True, return_weights="per_head")
        seen = result.weights[0, 0] > 0
        expected = torch.ones(N, M).tril(M - N).bool()
        assert torch.equal(seen, expected)
