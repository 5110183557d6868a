"""Keys that are the values (`v=None`): heads of the width of a context, read once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import Case, functional_cases, make_inputs
from mmfast.testing.inputs import Inputs
from mmfast.testing.packing import packed

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The registry's problems, and what the widths, the row counts and the key ranges choose between.
CASES = {
    case.name: dataclasses.replace(case, Dv=case.D)
    for case in functional_cases()
    if not case.name.startswith("widths_")
}
_EVERYTHING = {
    "importance": True, "dlse": True, "weights": "per_head", "bias": "B1NM", "segments": "images",
    "segment_rule": "at_most", "dropout_p": 0.2, "gate": "full", "is_causal": True,
}  # fmt: skip
WIDE = [
    Case("pool", 2, 12, 1, 77, 768, G=1, layout="bnhd"),
    Case("pool_lens", 5, 3, 1, 150, 768, G=1, kv_lens=(150, 129, 64, 1, 0)),
    Case("pool_one_item", 1, 12, 1, 333, 320, G=1, dlse=True),
    Case("pool_one_row", 2, 1, 1, 90, 1152),
    Case("queries", 2, 12, 11, 70, 352, G=1, q_lens=(11, 4)),
    Case("queries_two_key_heads", 1, 8, 9, 70, 1000, G=2, mask="BHNM"),
    Case("many_rows", 1, 4, 40, 140, 1408, G=1, kv_lens=(131,)),
    Case("odd_width", 2, 6, 3, 45, 789, G=1, layout="misaligned", mask="B11M"),
    Case("dead_columns", 2, 6, 2, 150, 544, G=1, mask="B11M", mask_kind="dead_columns"),
    Case("dead_item", 2, 6, 2, 50, 544, G=1, mask="B11M", mask_kind="dead_item"),
    Case("everything", 2, 4, 5, 140, 544, G=1, kv_lens=(140, 60), **_EVERYTHING),
    Case("everything_ranges", 1, 4, 2, 300, 544, G=1, kv_lens=(290,), **_EVERYTHING),
    Case("bias_summed", 2, 3, 30, 150, 528, G=1, bias="11NM", gate="head", gate_dtype="float32"),
    Case("bias_of_keys", 1, 3, 2, 400, 528, G=1, bias="111M", dropout_p=0.4, q_lens=(1,)),
    Case("widest", 1, 2, 1, 20, 8192, G=1),
]  # fmt: skip
CASES |= {f"wide_{case.name}": case for case in WIDE}
WIDE_NAMES = [name for name in CASES if name.startswith("wide_")]
FEW = ["dense", "both_lens", "segments_everything", "row_chunks", "key_ranges", "layout_packed"]


class _KeysOfBoth(torch.autograd.Function):
    """The keys; they alone get the gradient. The ruler gives keys and values apart."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor) -> Tensor:
        return k.view_as(k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros_like(gradient)


def _shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on keys that are the values, as one of keys and values."""

    def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return function(q, _KeysOfBoth.apply(k, v), None, **options)

    return call


def _inputs(name: str, dtype: torch.dtype) -> Inputs:
    inputs = make_inputs(CASES[name], dtype)
    return dataclasses.replace(inputs, v=inputs.k.detach())


def _run(
    inputs: Inputs, function: Callable[..., Any] = mmfast.cross_attention
) -> tolerance.Results:
    results = tolerance.run(_shared(function), inputs)
    assert not results.pop("dv").any()
    return results


@functools.lru_cache(maxsize=1024)
def _truth(name: str, dtype: torch.dtype) -> tolerance.Truth:
    """What is known of keys and values apart, for the one gradient of both."""
    apart = tolerance.truth(_inputs(name, dtype))
    stored, sums = dict(apart.stored), dict(apart.sums)
    stored["dk"] = (stored["dk"] ** 2 + stored.pop("dv") ** 2) ** 0.5
    sums["dk"] += sums.pop("dv")

    def both(results: tolerance.Results) -> tolerance.Results:
        rest = {key: value for key, value in results.items() if key != "dv"}
        return rest | {"dk": results["dk"] + results["dv"]}

    return tolerance.Truth(apart.inputs, both(apart.exact), both(apart.peer), stored, sums)


def _assert_same(got: tolerance.Results, expected: tolerance.Results) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=_name)
@pytest.mark.parametrize("name", [name for name in CASES if name not in WIDE_NAMES])
def test_every_case(name, dtype, backend):
    against = _truth(name, dtype)
    tolerance.assert_accurate(_run(against.inputs), against)


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("name", [*WIDE_NAMES, *FEW])
def test_each_kernel(name, dtype, implementation):
    against = _truth(name, dtype)
    tolerance.assert_accurate(_run(against.inputs), against)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=_name)
@pytest.mark.parametrize("name", [*WIDE_NAMES, "both_lens", "mask_dead_columns", "gate_lens"])
def test_what_nobody_sees_may_be_nan(name, dtype, implementation):
    inputs = _inputs(name, dtype)
    poisoned = inputs.poisoned()
    _assert_same(_run(dataclasses.replace(poisoned, v=poisoned.k)), _run(inputs))


@pytest.mark.parametrize("sides", [("kv",), ("q", "kv")], ids=["kv", "q_and_kv"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=_name)
@pytest.mark.parametrize("name", [*WIDE_NAMES, *FEW])
def test_packed_rows_give_what_padded_ones_do(name, dtype, sides):
    """Bit for bit; around the items lie NaN, and zeros in the gradients."""
    inputs = _inputs(name, dtype)
    _assert_same(_run(inputs, packed(mmfast.cross_attention, sides)), _run(inputs))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=_name)
@pytest.mark.parametrize("name", ["wide_pool_lens", "wide_everything_ranges", "wide_many_rows"])
def test_the_number_of_threads_changes_no_bit(name, dtype, backend):
    inputs = _inputs(name, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_run(inputs))
    finally:
        torch.set_num_threads(before)
    _assert_same(results[1], results[0])
    _assert_same(results[2], results[0])


def test_an_item_alone_gives_what_it_gives_among_others(implementation):
    """Few items have their keys cut into ranges, whose sums are rounded elsewhere."""
    g = torch.Generator().manual_seed(1)
    q, x = torch.randn(20, 6, 1, 640, generator=g), torch.randn(20, 1, 400, 640, generator=g)
    together = mmfast.cross_attention(q, x, None, return_lse=True)
    alone = mmfast.cross_attention(q[3:4], x[3:4], None, return_lse=True)
    torch.testing.assert_close(alone.out, together.out[3:4], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.lse, together.lse[3:4])


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=["items", "rows", "keys"])
def test_empty(sizes, implementation):
    B, N, M = sizes
    q, x = torch.ones(B, 4, N, 600, requires_grad=True), torch.ones(B, 1, M, 600)
    x.requires_grad_()
    out = mmfast.cross_attention(q, x, None)
    out.sum().backward()
    assert out.shape == q.shape
    assert not out.any()
    assert not q.grad.any()
    assert not x.grad.any()


def test_a_gradient_of_the_queries_alone(implementation):
    inputs = _inputs("wide_pool_lens", torch.float32)
    expected = _run(inputs)["dq"]
    q = inputs.q.clone().requires_grad_()
    mmfast.cross_attention(q, inputs.k, None, **inputs.options).backward(inputs.dout)
    assert torch.equal(q.grad, expected)


@pytest.mark.parametrize("D", [768, 1000])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=_name)
def test_wide_heads_with_values_of_their_own(D, dtype, implementation):
    """The general kernels at such widths: few rows and many, narrow values beside wide keys."""
    for case in (
        Case("few_rows", 2, 2, 2, 40, D, Dv=1, kv_lens=(40, 7)),
        Case("rows", 2, 2, 9, 40, D, Dv=24, mask="B1NM", importance=True, weights=True),
        Case("wide_values", 1, 2, 9, 40, 24, Dv=D, bias="11NM", gate="head"),
    ):
        against = tolerance.truth(make_inputs(case, dtype))
        tolerance.assert_accurate(tolerance.run(mmfast.cross_attention, against.inputs), against)
