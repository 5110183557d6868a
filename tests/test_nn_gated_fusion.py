"""`mmfast.nn.GatedFusion` against plain torch, and what a missing modality may not do."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from nn_helpers import check_autocast, check_compiled, check_module, compare, gradients, loud
from torch import Tensor

import mmfast.nn.gated_fusion as implementation
from mmfast.nn import GatedFusion

B, C = 4, 6
DIMS = (5, 7, 3)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"per": "channel"},
    {"mode": "sigmoid", "gate": "static", "per": "channel", "bias": False},
    {"mode": "sigmoid"},
    {"mode": "gmu"},
    {"mode": "gmu", "per": "modality", "bias": False},
    {"mode": "gmu", "dims": DIMS[:2]},
    {"mode": "gmu", "dims": DIMS[:2], "per": "modality"},
    {"mode": "gmu", "dims": DIMS[:2], "tied": False},
    {"mode": "gmu", "dims": (5, 2), "dim": 2, "tied": False, "per": "modality"},
    {"mode": "gmu", "dims": DIMS[:2], "gate": "static"},
    {"mode": "gmu", "dims": DIMS[:2], "gate": "static", "per": "modality"},
    {"gate": "static"},
    {"dims": (C, C, C), "dim": None},
    {"dims": (C, C, C), "dim": None, "gate": "static", "per": "channel"},
    {"dims": (5,), "mode": "softmax"},
]
# Item 0 has everything, item 1 lacks modality 1, item 2 has only modality 1, item 3 has nothing.
PRESENT = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def fusion(**options: Any) -> GatedFusion:
    module = loud(GatedFusion(**{"dims": DIMS, "dim": C, **options}))
    if module.logits is not None:
        with torch.no_grad():
            module.logits.normal_()
    return module


def features(module: GatedFusion, *leading: int) -> list[Tensor]:
    return [torch.randn(*(leading or (B,)), width) for width in module.dims]


def call(module: GatedFusion, *xs: Tensor, present: Tensor | None = None) -> Tensor:
    return module(xs, present)


def eager(module: GatedFusion, *xs: Tensor, present: Tensor | None = None) -> Tensor:
    """Row by row and modality by modality, as the docstring has it."""
    K, lead = len(xs), xs[0].shape[:-1]
    if present is None:
        present = torch.ones(K, dtype=torch.bool)
    elif present.dim() == 2:
        present = present.view(len(present), *(1,) * (len(lead) - 1), K)
    there = [present[..., k : k + 1].expand(*lead, 1) for k in range(K)]
    xs = tuple(torch.where(t, x, 0.0) for t, x in zip(there, xs, strict=True))
    hs = xs if module.projs is None else [p(x) for p, x in zip(module.projs, xs, strict=True)]
    if module.mode == "gmu":
        hs = [h.tanh() for h in hs]
    last = module.dim if module.per == "channel" else 1
    if module.logits is not None:
        logits = module.logits.view(-1, last).expand(*lead, -1, last)
    else:
        logits = module.gate_proj(torch.cat(xs, -1)).view(*lead, -1, last)
    if module.tied:
        z = logits[..., 0, :].sigmoid()
        weights = [z, 1 - z]
    elif module.mode == "softmax":
        mask = torch.stack(there, -2)
        weights = logits.masked_fill(~mask, float("-inf")).softmax(-2)
        weights = torch.where(mask, weights, 0.0).unbind(-2)
    else:
        weights = logits.sigmoid().unbind(-2)
    out = torch.zeros(*lead, module.dim, dtype=hs[0].dtype)
    for t, w, h in zip(there, weights, hs, strict=True):
        out = out + torch.where(t, w * h, 0.0)
    return out


def missing(module: GatedFusion, *leading: int) -> Tensor:
    present = PRESENT[:, : len(module.dims)]
    if not leading:
        return present
    return torch.rand(*leading, len(module.dims)) < 0.6


# --- the same results --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_variant(variant: dict[str, Any], dtype: torch.dtype) -> None:
    module = fusion(**variant, dtype=dtype)
    compare(module, call, eager, *features(module))
    compare(module, call, eager, *features(module, B, 3))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("leading", [(B,), (B, 3), (B, 2, 3)])
def test_missing_modalities(variant: dict[str, Any], leading: tuple[int, ...]) -> None:
    module = fusion(**variant)
    # PyTorch's softmax over nothing is NaN in the eager version's gradient: there is something.
    by_item = missing(module)
    by_item[3, 0] = True
    for present in (by_item, missing(module, *leading)):
        if module.mode == "softmax":
            present[..., 0] = True

        def mine(m: GatedFusion, *xs: Tensor, present: Tensor = present) -> Tensor:
            return call(m, *xs, present=present)

        def theirs(m: GatedFusion, *xs: Tensor, present: Tensor = present) -> Tensor:
            return eager(m, *xs, present=present)

        compare(module, mine, theirs, *features(module, *leading))


def test_the_published_unit() -> None:
    """Arevalo et al. 2017, equations of the bimodal unit; no biases."""
    module = fusion(mode="gmu", dims=(5, 7), bias=False)
    v, t = torch.randn(B, 5), torch.randn(B, 7)
    h_v, h_t = torch.tanh(v @ module.projs[0].weight.T), torch.tanh(t @ module.projs[1].weight.T)
    z = torch.sigmoid(torch.cat([v, t], 1) @ module.gate_proj.weight.T)
    torch.testing.assert_close(module([v, t]), z * h_v + (1 - z) * h_t)


def test_the_layer_mix_of_wav2vec2() -> None:
    """`softmax(layer_weights)` over stacked hidden states, as its classification heads do."""
    module = fusion(dims=(C, C, C), dim=None, gate="static")
    hidden = torch.randn(B, 3, 7, C)
    weights = torch.nn.functional.softmax(module.logits, dim=-1)
    expected = (hidden * weights.view(-1, 1, 1)).sum(dim=1)
    torch.testing.assert_close(module(hidden.unbind(1)), expected)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "dims" not in v], ids=str)
def test_the_order_of_the_modalities_does_not_matter(variant: dict[str, Any]) -> None:
    order = [2, 0, 1]
    module = fusion(**variant)
    xs, present = features(module), missing(module)
    other = GatedFusion([DIMS[k] for k in order], C, **variant)
    state = copy.deepcopy(module.state_dict())
    for new, old in enumerate(order):
        for name in ("weight", "bias") if module.projs[0].bias is not None else ("weight",):
            state[f"projs.{new}.{name}"] = module.state_dict()[f"projs.{old}.{name}"]
    if module.logits is not None:
        state["logits"] = module.logits[order]
    else:
        columns = torch.cat([module.gate_proj.weight.split(DIMS, 1)[k] for k in order], 1)
        by_modality = columns.view(3, -1, columns.shape[1])[order]
        state["gate_proj.weight"] = by_modality.flatten(0, 1)
        if module.gate_proj.bias is not None:
            state["gate_proj.bias"] = module.gate_proj.bias.view(3, -1)[order].flatten()
    other.load_state_dict(state)
    torch.testing.assert_close(
        other([xs[k] for k in order], present[:, order]), module(xs, present)
    )


# --- a missing modality ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("leading", [(), (B, 3)])
def test_a_missing_modality_contributes_exactly_nothing(
    variant: dict[str, Any], leading: tuple[int, ...]
) -> None:
    """The NaN that stands for it changes no bit of any result or gradient."""
    module = fusion(**variant)
    clean, present = features(module, *leading), missing(module, *leading)
    results = []
    for filler in (0.0, float("nan"), float("inf")):
        xs = [
            x.masked_fill(~present[..., k, None], filler).requires_grad_()
            for k, x in enumerate(clean)
        ]
        out, weights = module(xs, present, return_weights=True)
        assert torch.equal(out, module(xs, present))
        nothing = ~present.any(-1)
        assert (out[nothing] == 0).all()
        absent = ~present if module.per == "modality" else ~present[..., None].expand_as(weights)
        assert (weights[absent] == 0).all() and (weights[~absent] > 0).all()
        grads = gradients(out, module, *xs)
        for k in range(len(xs)):
            assert (grads[k][~present[..., k]] == 0).all()
        results.append([out, weights, *grads])
    for zeros, *others in zip(*results, strict=True):
        assert all(torch.equal(zeros, other) for other in others)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("dims") != (5,)], ids=str)
@pytest.mark.parametrize("lacking", [0, 1])
def test_a_modality_that_nobody_has(variant: dict[str, Any], lacking: int) -> None:
    """None says the same as `present` False; its own weights get a gradient of exactly 0."""
    module = fusion(**variant)
    xs: list[Any] = features(module, B, 3)
    present = torch.ones(B, len(xs), dtype=torch.bool)
    present[:, lacking] = False
    xs[lacking] = torch.full_like(xs[lacking], float("nan"))
    by_present, weights = module(xs, present, return_weights=True)
    grads = gradients(by_present, module)
    for also in (None, present):
        xs[lacking] = None
        by_none, same = module(xs, also, return_weights=True)
        torch.testing.assert_close(by_none, by_present)
        torch.testing.assert_close(same, weights)
        for a, b in zip(gradients(by_none, module), grads, strict=True):
            torch.testing.assert_close(a, b)
    named = dict(zip((n for n, _ in module.named_parameters()), grads, strict=True))
    if module.projs is not None:
        assert all((g == 0).all() for n, g in named.items() if n.startswith(f"projs.{lacking}."))
    if module.gate_proj is not None:
        assert (named["gate_proj.weight"].split(module.dims, 1)[lacking] == 0).all()
        assert any((part != 0).any() for part in named["gate_proj.weight"].split(module.dims, 1))


@pytest.mark.parametrize("by_row", [False, True])
def test_none_wins_over_present(by_row: bool) -> None:
    module = fusion()
    xs: list[Any] = features(module, B, 2)
    present = missing(module, B, 2) if by_row else missing(module)
    without = present.clone()
    without[..., 1] = False
    expected = module(xs, without)
    torch.testing.assert_close(module([xs[0], None, xs[2]], present), expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nobody_has_anything(variant: dict[str, Any]) -> None:
    module = fusion(**variant)
    xs = [torch.full((B, 3, width), float("nan")).requires_grad_() for width in module.dims]
    out = module(xs, torch.zeros(B, len(xs), dtype=torch.bool))
    assert torch.equal(out, torch.zeros(B, 3, module.dim))
    assert all((g == 0).all() for g in gradients(out, module, *xs))


def test_items_are_independent() -> None:
    module = fusion(mode="gmu")
    xs, present = features(module), missing(module)
    together = module(xs, present)
    for item in range(B):
        alone = module([x[item : item + 1] for x in xs], present[item : item + 1])
        torch.testing.assert_close(alone[0], together[item])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_weights_explain_the_result(variant: dict[str, Any]) -> None:
    module = fusion(**variant)
    xs = features(module, B, 3)
    for present in (None, missing(module)):
        out, weights = module(xs, present, return_weights=True)
        assert weights.shape == (B, 3, len(xs), *((module.dim,) * (module.per == "channel")))
        hs = xs if module.projs is None else [p(x) for p, x in zip(module.projs, xs, strict=True)]
        h = torch.stack(hs, -2)
        h = h.tanh() if module.mode == "gmu" else h
        weighted = (weights if module.per == "channel" else weights[..., None]) * h
        if present is None:
            torch.testing.assert_close(weighted.sum(-2), out)
        if module.mode == "softmax":
            total = weights.sum(2)
            some = torch.ones(B) if present is None else present.any(-1).float()
            expected = some.view(B, *(1,) * (total.dim() - 1)).expand_as(total)
            torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (B, 0)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    for variant in VARIANTS:
        module = fusion(**variant)
        xs = [torch.randn(*shape, width) for width in module.dims]
        for present in (None, torch.zeros(shape[0], len(xs), dtype=torch.bool)):
            out = module(xs, present)
            assert out.shape == (*shape, module.dim)
            assert all((g == 0).all() for g in gradients(out, module))


# --- as a module -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, {"gate": "static"}, {"mode": "gmu"}], ids=str)
def test_as_a_module(variant: dict[str, Any]) -> None:
    def make(**options: Any) -> GatedFusion:
        return GatedFusion(DIMS, C, **variant, **options)

    xs = features(fusion())
    made = check_module(make, lambda module: module(xs, PRESENT))
    assert f"mode={made.mode!r}" in repr(made)


def test_static_weights_start_equal() -> None:
    module = GatedFusion([C, C], gate="static")
    a, b = features(module)
    torch.testing.assert_close(module([a, b]), (a + b) / 2)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[6], VARIANTS[12]], ids=str)
def test_compile_autocast_gradcheck(variant: dict[str, Any]) -> None:
    module = fusion(**variant)
    xs, present = features(module, B, 3), missing(module)

    def masked(module: GatedFusion, *xs: Tensor) -> Tensor:
        return module(xs, present)

    check_compiled(module, masked, *xs)
    assert check_autocast(module, masked, *xs).dtype == torch.bfloat16
    leaves = tuple(x.double().requires_grad_() for x in xs)
    module = module.double()
    assert torch.autograd.gradcheck(lambda *xs: masked(module, *xs), leaves, fast_mode=True)


def test_autocast_without_projections() -> None:
    module = fusion(dims=(C, C), dim=None)
    assert check_autocast(module, call, *features(module)).dtype == torch.float32


XS = [torch.zeros(B, 2, width) for width in DIMS]


@pytest.mark.parametrize(
    "xs, present, kind, message",
    [
        (XS[0], None, ValueError, "features must be a list of 3 tensors .* got Tensor; give None"),
        (XS[:2], None, ValueError, "features must be a list of 3 tensors .* got 2; give None"),
        ([None] * 3, None, ValueError, "every feature is None; give at least one tensor"),
        ([XS[0], 1.0, XS[2]], None, TypeError, r"features\[1\] must be a torch.Tensor, got float"),
        ([XS[0]] * 3, None, ValueError, r"features\[1\] has width 5 but .* dims\[1\]=7"),
        ([XS[0], XS[1][1:], None], None, ValueError, r"features\[1\] has shape \[3, 2, 7\], but"),
        ([x[0, 0] for x in XS], None, ValueError, r"features have shape \[5\], expected \[B, ..."),
        (
            [x.half() for x in XS],
            None,
            TypeError,
            r"features\[0\] has dtype torch.float16 and .* but",
        ),
        (XS, [True], TypeError, "present must be a torch.Tensor, got list; convert it"),
        (XS, torch.ones(B, 3), TypeError, "present must be a bool tensor, got torch.float32; True"),
        (XS, PRESENT[:, 1:], ValueError, r"present has shape \[4, 2\], expected \[4, 3\] .* or \["),
        (
            XS,
            PRESENT.to("meta"),
            ValueError,
            "present is on meta but the module's inputs are on cpu",
        ),
        (XS, PRESENT[0], ValueError, r"present has shape \[3\], expected \[4, 3\]"),
    ],
)
def test_errors(xs: Sequence[Any], present: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"GatedFusion: {message}"):
        GatedFusion(DIMS, C)(xs, present)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dims": 5}, "dims is 5; it must hold the width of each modality"),
        ({"dims": []}, r"dims is \[\]; it must hold the width of each modality"),
        ({"dims": [5, 0]}, r"dims\[1\] is 0; it must be at least 1"),
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"dim": None}, r"dims is \[5, 7, 3\] and dim is None; .* give dim"),
        ({"mode": "mean"}, "mode is 'mean'; it must be 'softmax', 'sigmoid' or 'gmu'"),
        ({"gate": "none"}, "gate is 'none'; it must be 'features' or 'static'"),
        ({"per": "row"}, "per is 'row'; it must be None, 'modality' or 'channel'"),
        ({"tied": True}, "tied=True with mode='softmax' and 3 modalities; one shared gate"),
        ({"tied": True, "mode": "gmu"}, "tied=True with mode='gmu' and 3 modalities"),
    ],
)
def test_constructor_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"GatedFusion: {message}"):
        GatedFusion(**{"dims": DIMS, "dim": C, **options})


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(implementation).failed == 0
