"""Every plan of the attention modules gives what the projected form gives: results and gradients.

The registry's cases, as modules of their sizes, against the reference backend in float64; eager
code in the same dtype says how far off a result may be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mha_helpers import L, S, attention_mask, check, padding_mask, pair
from nn_helpers import Calls, assert_near, check_compiled, gradients, loud
from torch import Tensor

import mmfast
import mmfast.nn._projected_attention as implementation
from mmfast.nn import (
    CrossModalAttention,
    GatedCrossAttentionBlock,
    MultiheadAttention,
    PackedTokens,
)
from mmfast.planning import PLANS
from mmfast.testing import eager
from mmfast.testing.cases import CROSS_ATTENTION, Case, functional_cases, make_inputs

E, C = 24, 20
DROPOUT_SEED = 5
_GATES = {None: None, "head": "head", "full": "channel"}
_NAMES = {
    "kv_lens": "context_lens", "q_lens": "x_lens", "q_segments": "x_segments",
    "kv_segments": "context_segments",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- the registry ------------------------------------------------------------------------------

# A module has no scale of its own, and its projections have one layout.
CASES = [
    case.name
    for case in functional_cases()
    if case.scale is None and not case.name.startswith("layout_")
]
QUICK = (
    "one_query", "width_3", "width_512", "widths_64_1", "empty_batch", "empty_keys", "gqa_3_ragged",
    "lens_all_zero", "both_lens", "causal_lens", "segments_everything", "mask_dead_rows",
    "mask_BH11", "bias_infinite", "gate_lens", "dropout_gate_bias", "results_everything",
    "few_rows_everything", "few_rows_heads",
)  # fmt: skip


def module_of(case: Case, dtype: torch.dtype) -> CrossModalAttention:
    module = CrossModalAttention(
        E, case.H, num_kv_heads=case.G, context_dim=C, head_dim=case.D, value_head_dim=case.Dv,
        gate=_GATES[case.gate], dropout=case.dropout_p,
    )  # fmt: skip
    return loud(module).to(dtype)


def outcome(
    module: torch.nn.Module, x: Tensor, context: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Results and gradients of one call in the dtype of `module`, by name."""
    dtype = next(module.parameters()).dtype
    leaves = {"x": x, "context": context}
    if "bias" in options:
        leaves["bias"] = options["bias"]
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    torch.manual_seed(DROPOUT_SEED)
    given = {**options, **{name: leaf for name, leaf in leaves.items() if name == "bias"}}
    result = module(leaves["x"], leaves["context"], **{**given, "return_lse": True})
    results = {name: part for name, part in result._asdict().items() if part is not None}
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64)
    for part in results.values():
        direction = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        loss = loss + (part.double().masked_fill(part == -torch.inf, 0.0) * direction).sum()
    leaves |= dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: part.detach() for name, part in results.items()}


def check_case(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CROSS_ATTENTION[name]
    module = module_of(case, dtype)
    inputs = make_inputs(case, dtype)
    options = {_NAMES.get(key, key): value for key, value in inputs.options.items()}
    for own in ("gate", "dropout_p", "scale"):
        options.pop(own, None)
    x = case.magnitude * torch.randn(case.B, case.N, E, dtype=dtype)
    context = torch.randn(case.B, case.M, C, dtype=dtype)
    with mmfast.use_plan("projected"):
        with mmfast.use_backend("reference"):
            exact = outcome(copy.deepcopy(module).double(), x, context, _double(options))
        with monkeypatch.context() as patch:
            patch.setattr(implementation, "cross_attention", _eager)
            peer = outcome(module, x, context, options)
    # The gradient of a key bias is a sum that cancels to 0, except through the LSE; that of the key
    # weight tells how large its terms are.
    terms = float(exact["dk_proj.weight"].abs().max())
    for plan in PLANS:
        with mmfast.use_plan(plan):
            got = outcome(module, x, context, options)
        assert got.keys() == exact.keys()
        for key, expected in exact.items():
            size = max(1.0, terms) if key == "dk_proj.bias" else 1.0
            assert_near(f"{plan} {key}", got[key], expected, peer[key], size)


def _double(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }


def _eager(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    options.pop("dropout_seed", None)
    torch.manual_seed(DROPOUT_SEED)  # it draws its own
    return eager.cross_attention(q, k, v, **options)


@pytest.mark.parametrize("name", QUICK)
def test_registry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(name, torch.float32, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_registry_whole(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(name, dtype, monkeypatch)


# --- a plan never changes the result -----------------------------------------------------------

FORMS = ("dense", "lens", "packed", "holes", "jagged")


def stream(form: str, lens: list[int], length: int, x: Tensor) -> tuple[Any, dict[str, Any]]:
    """x `[B, length, ...]` in a form; what lies past the lengths is NaN, or is not there."""
    n = torch.tensor(lens, dtype=torch.int64)
    if form == "dense":
        return x, {}
    if form == "holes":  # the same number of tokens, but from the right
        return PackedTokens.from_padded(
            x, padding_mask=torch.arange(length) < (length - n)[:, None]
        ), {}
    x = x.masked_fill((torch.arange(length) >= n[:, None])[..., None], float("nan"))
    if form == "lens":
        return x, {"lens": n}
    packed = PackedTokens.from_padded(x, n)
    return (packed.to_nested() if form == "jagged" else packed), {}


def values(out: Any) -> Tensor:
    if isinstance(out, PackedTokens):
        return out.values
    return out.values() if out.is_nested else out


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    x_form=st.sampled_from(FORMS),
    form=st.sampled_from(FORMS),
    variant=st.sampled_from(
        [
            {},
            {"num_kv_heads": 2, "context_dim": 6, "gate": "head"},
            {"num_kv_heads": 1, "bias": False, "gate": "channel", "value_head_dim": 3},
            {"qk_norm": "rms"},
            {"out_bias": False, "dropout": 0.3},
        ]
    ),
    condition=st.sampled_from([None, "mask", "bias", "causal", "segments"]),
    more=st.booleans(),
    small=st.sampled_from([0, 10**9]),
)
def test_a_plan_never_changes_the_result(
    data: st.DataObject, x_form: str, form: str, variant: dict[str, Any], condition: str | None,
    more: bool, small: int,
) -> None:  # fmt: skip
    """Any form of both streams, with and without padded coordinates, forward and backward."""
    B, N, M = (data.draw(st.integers(low, 4)) for low in (0, 0, 0))
    if "jagged" in (x_form, form) and 0 in (B, N, M):
        return  # torch makes no empty jagged tensors
    rows = data.draw(st.lists(st.integers(0, N), min_size=B, max_size=B))
    keys = data.draw(st.lists(st.integers(0, M), min_size=B, max_size=B))
    module = loud(CrossModalAttention(8, 4, **variant)).double()
    x = torch.randn(B, N, 8, dtype=torch.float64, requires_grad=True)
    context = torch.randn(B, M, module.context_dim, dtype=torch.float64, requires_grad=True)
    results = []
    for backend, plan in (("reference", "projected"), *(("auto", plan) for plan in PLANS)):
        x_in, x_lens = stream(x_form, rows, N, x)
        context_in, context_lens = stream(form, keys, M, context)
        padded_n = max(rows, default=0) if x_form == "jagged" else N
        padded_m = max(keys, default=0) if form == "jagged" else M
        options: dict[str, Any] = {
            **{f"x_{key}": value for key, value in x_lens.items()},
            **{f"context_{key}": value for key, value in context_lens.items()},
        }
        torch.manual_seed(1)
        if condition == "mask":
            options["mask"] = torch.rand(B, 4, padded_n, padded_m) < 0.6
        elif condition == "bias":
            options["bias"] = torch.randn(1, 4, padded_n, padded_m, dtype=torch.float64)
        elif condition == "causal":
            options["is_causal"] = True
        elif condition == "segments":
            options["x_segments"] = torch.randint(0, 3, (B, padded_n))
            options["context_segments"] = torch.randint(0, 3, (B, padded_m))
        if more:
            options |= {"return_lse": True, "return_importance": True, "return_weights": True}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mmfast.nn._tokens._SMALL", small)
            with mmfast.use_backend(backend), mmfast.use_plan(plan):
                result = module(x_in, context_in, **options)
        parts = list(result) if more else [result]
        assert type(parts[0]) is type(x_in)
        parts[0] = values(parts[0])
        loss = torch.zeros((), dtype=torch.float64)
        for part in parts:
            weight = torch.linspace(-1.0, 1.0, part.numel(), dtype=torch.float64).view_as(part)
            loss = loss + (part.masked_fill(part == -torch.inf, 0.0) * weight).sum()
        results.append([*parts, *torch.autograd.grad(loss, [x, context, *module.parameters()])])
    for parts in zip(*results, strict=True):
        for part in parts[1:]:
            torch.testing.assert_close(part, parts[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["attention", "block"])
def test_padding_content_is_irrelevant(plan: str, kind: str) -> None:
    """Bit for bit, with a missing modality among the items, gradients of the weights included."""
    module: torch.nn.Module
    if kind == "block":
        module = loud(GatedCrossAttentionBlock(E, 4, context_dim=C, mask_feed_forward=True))
    else:
        module = loud(CrossModalAttention(E, 4, context_dim=C))
    clean_x, clean = torch.randn(3, 5, E), torch.randn(3, 7, C)
    x_lens, lens = torch.tensor([5, 2, 3]), torch.tensor([7, 4, 0])
    results = []
    for filler in (0.0, float("nan"), float("inf")):
        pads = [torch.arange(n) >= m[:, None] for n, m in ((5, x_lens), (7, lens))]
        x, context = (
            y.masked_fill(pad[..., None], filler).requires_grad_()
            for y, pad in zip((clean_x, clean), pads, strict=True)
        )
        with mmfast.use_plan(plan):
            out = module(x, context, context_lens=lens, x_lens=x_lens)
        grads = gradients(out, module, x, context)
        assert (out[pads[0]] == 0).all() and (grads[0][pads[0]] == 0).all()
        assert (grads[1][pads[1]] == 0).all()
        if kind == "attention":
            assert (out[2] == 0).all()
        results.append([out, *grads])
    for zeros, *others in zip(*results, strict=True):
        assert all(torch.equal(zeros, other) for other in others)


# --- what a plan does --------------------------------------------------------------------------


def test_absorbing_neither_copies_nor_projects_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(implementation, "cross_attention", calls)
    context = torch.randn(2, 9, C)
    packed = PackedTokens.from_padded(context)
    for module in (
        CrossModalAttention(E, 4, context_dim=C),
        MultiheadAttention(E, 4, kdim=C, vdim=C),
    ):
        with mmfast.use_plan("absorbed"):
            for given in (context, context.transpose(0, 1).contiguous().transpose(0, 1), packed):
                module.attend(torch.randn(2, 1, E), given)
                used = given.values if isinstance(given, PackedTokens) else given
                assert calls.last["k"].data_ptr() == used.data_ptr() and calls.last["v"] is None
                assert calls.last["k"].shape[-1] == C


def test_packing_projects_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(implementation, "cross_attention", calls)
    context, lens = torch.randn(3, 9, E), torch.tensor([9, 2, 0])
    with mmfast.use_plan("packed"):
        CrossModalAttention(E, 4)(torch.randn(3, 5, E), context, context_lens=lens)
        assert calls.last["k"].shape == (4, 11, 6) and calls.last["max_kv_len"] == 9
        holes = torch.rand(3, 9) < 0.5
        MultiheadAttention(E, 4, batch_first=True)(
            torch.randn(3, 5, E), context, context, key_padding_mask=holes, need_weights=False
        )
        assert calls.last["k"].shape == (4, int((~holes).sum()), 6)
        assert calls.last["kv_segments"] is None


def test_what_cannot_be_followed_is_projected_and_explained() -> None:
    x, context = torch.randn(2, 1, E), torch.randn(2, 50, E)
    normed, hooked = CrossModalAttention(E, 4, qk_norm="rms"), CrossModalAttention(E, 4)
    hooked.v_proj.register_forward_hook(lambda module, args, out: out * 2)
    wrapped = CrossModalAttention(E, 4)
    wrapped.k_proj = torch.nn.Sequential(wrapped.k_proj)  # type: ignore[assignment]
    for module, reason in ((normed, "norm"), (hooked, "hooks"), (wrapped, "plain torch.nn.Linear")):
        with mmfast.use_plan("projected"):
            expected = module(x, context)
        with mmfast.use_plan("absorbed"):
            assert torch.equal(module(x, context), expected)
            plan = module.explain()
        assert plan.name == "projected" and reason in plan.why
    stock = MultiheadAttention(E, 4, add_zero_attn=True, batch_first=True)
    expected = stock(x, context, context)[0]
    with mmfast.use_plan("packed"):
        assert torch.equal(stock(x, context, context)[0], expected)


def test_few_queries_absorb_and_the_key_bias_keeps_its_gradient() -> None:
    module = CrossModalAttention(256, 4)
    x, context = torch.randn(4, 1, 256), torch.randn(4, 300, 256)
    out = module(x, context)
    assert module.explain().name == "absorbed"
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert (module.k_proj.bias.grad == 0).all()


# --- the drop-in of torch.nn's module ----------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", ["none", "right", "left", "scattered", "scattered values"])
def test_multihead_attention(padding: str, need_weights: bool, plan: str) -> None:
    for batch_first, mask, same in (
        (True, "none", "kv"),
        (False, "float 2d", "kv"),
        (False, "none", "self"),
    ):
        options = {"batch_first": batch_first, "bias": mask == "none"}
        keys = L if same == "self" else S
        shape = (lambda n: (3, n, E)) if batch_first else (lambda n: (n, 3, E))
        inputs = [torch.randn(shape(n)) for n in (L, keys, keys)]
        with mmfast.use_plan(plan):
            check(
                *pair(**options), inputs, same, need_weights=need_weights,
                key_padding_mask=padding_mask(padding, 3, keys),
                attn_mask=attention_mask(mask, 3, L, keys),
            )  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_dead_rows_of_multihead_attention_are_the_output_bias(plan: str) -> None:
    module = loud(MultiheadAttention(E, 4, batch_first=True))
    x, context = torch.randn(3, 2, E), torch.randn(3, 7, E)
    lens = torch.tensor([7, 0, 3])
    with mmfast.use_plan(plan):
        out = module.attend(x, context, context_lens=lens)
        assert torch.equal(out[1], module.out_proj.bias.expand(2, E))
        mask = torch.ones(1, 4, 2, 7, dtype=torch.bool)
        mask[:, 1, 0] = False  # one head of one row
        with mmfast.use_backend("reference"), mmfast.use_plan("projected"):
            expected = module.attend(x, context, mask=mask)
        torch.testing.assert_close(
            module.attend(x, context, mask=mask), expected, rtol=1e-4, atol=1e-5
        )


# --- transforms --------------------------------------------------------------------------------


def _one_query(module: Any, x: Tensor, context: Tensor) -> Tensor:
    lens = torch.tensor([7, 4, 0])
    return module(x, context, context_lens=lens)


def _packed(module: Any, x: Tensor, context: Tensor) -> Tensor:
    streams = [PackedTokens(rows.flatten(0, 1), cu, 8) for rows, cu in zip((x, context), CU)]
    return module(*streams).values


CU = [
    torch.tensor([0, 2, 2, 6], dtype=torch.int32),
    torch.tensor([0, 7, 15, 21], dtype=torch.int32),
]


@pytest.mark.parametrize("call, rows", [(_one_query, 1), (_packed, 2)])
def test_compile_fullgraph(call: Callable[..., Tensor], rows: int) -> None:
    module = loud(CrossModalAttention(E, 4, num_kv_heads=2))
    with mmfast.use_plan("absorbed" if rows == 1 else "auto"):
        check_compiled(module, call, torch.randn(3, rows, E), torch.randn(3, 7, E))


@pytest.mark.parametrize("plan", PLANS)
def test_shapes_alone(plan: str) -> None:
    """On the meta device, where there is nothing to read and nothing to compute."""
    x, context = torch.randn(3, 1, E, device="meta"), torch.randn(3, 700, C, device="meta")
    with mmfast.use_plan(plan):
        module = CrossModalAttention(E, 4, context_dim=C, device="meta")
        lens = torch.zeros(3, dtype=torch.int64, device="meta")
        assert module(x, context, context_lens=lens).shape == (3, 1, E)
        stock = MultiheadAttention(E, 4, kdim=C, vdim=C, batch_first=True, device="meta")
        assert stock(x, context, context)[0].shape == (3, 1, E)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_compile_dynamic(plan: str) -> None:
    module = loud(MultiheadAttention(E, 4, batch_first=True))
    call = lambda m, x, c: m(x, c, c, need_weights=False)[0]  # noqa: E731
    with mmfast.use_plan(plan):
        check_compiled(module, call, torch.randn(3, 2, E), torch.randn(3, 7, E), dynamic=True)


def test_forward_mode_double_backward_and_vmap_when_absorbed() -> None:
    module = loud(CrossModalAttention(8, 2, gate="head")).double()
    x, context = torch.randn(2, 1, 8).double(), torch.randn(2, 4, 8).double()
    with mmfast.use_plan("absorbed"):
        tangent = torch.randn_like(context)
        _, got = torch.func.jvp(lambda c: module(x, c), (context,), (tangent,))
        step = 1e-6 * tangent
        expected = (module(x, context + step) - module(x, context - step)) / 2e-6
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
        batch = torch.stack([context, -context])
        mapped = torch.func.vmap(lambda c: module(x, c))(batch)
        torch.testing.assert_close(mapped[1], module(x, -context))
        with mmfast.use_backend("reference"):
            assert torch.autograd.gradgradcheck(
                lambda c: module(x, c), (context.requires_grad_(),), fast_mode=True
            )


@pytest.mark.parametrize("plan", PLANS)
def test_autocast(plan: str) -> None:
    module = loud(CrossModalAttention(E, 4, num_kv_heads=2, gate="channel"))
    x, context = torch.randn(3, 2, E), torch.randn(3, 7, E)
    lens = torch.tensor([7, 4, 0])
    expected = module(x, context, context_lens=lens)
    with torch.autocast("cpu", dtype=torch.bfloat16), mmfast.use_plan(plan):
        got = module(x, context, context_lens=lens)
    assert got.dtype == torch.bfloat16 and (got[2] == 0).all()
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()
    got.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
