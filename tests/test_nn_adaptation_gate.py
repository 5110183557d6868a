"""`mmfast.nn.AdaptationGate` against plain torch and against the authors' formula."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import check_autocast, check_compiled, check_module, compare, gradients, loud
from torch import Tensor

import mmfast.nn.adaptation_gate as implementation
from mmfast.nn import AdaptationGate

B, N, C = 4, 3, 8
SIDES = (5, 2)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"bias": False, "beta": 0.3},
    {"value_bias": True, "beta": 0.1},
    {"side_dims": (4,), "eps": 1e-3},
    {"side_dims": (4, 3, 2), "bias": False, "value_bias": True, "beta": 5.0},
]
# Item 0 has everything, item 1 lacks modality 1, item 2 has only modality 1, item 3 has nothing.
PRESENT = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def gate(**options: Any) -> AdaptationGate:
    return loud(AdaptationGate(**{"dim": C, "side_dims": SIDES, **options}))


def streams(module: AdaptationGate, *leading: int) -> list[Tensor]:
    leading = leading or (B, N)
    return [torch.randn(*leading, width) for width in (module.dim, *module.side_dims)]


def call(
    module: AdaptationGate, z: Tensor, *sides: Tensor, present: Tensor | None = None
) -> Tensor:
    return module(z, sides, present)


def eager(
    module: AdaptationGate, z: Tensor, *sides: Tensor, present: Tensor | None = None
) -> Tensor:
    """The docstring in plain torch; `present` `[B, K]` or by row."""
    if present is None:
        present = torch.ones(len(sides), dtype=torch.bool)
    elif present.dim() == 2:
        present = present.view(len(present), *(1,) * (z.dim() - 2), len(sides))
    h = torch.zeros_like(z) if module.shift is None else module.shift.expand_as(z)
    for k, side in enumerate(sides):
        there = present[..., k : k + 1]
        side = torch.where(there, side, 0.0)
        g = F.relu(module.gate_projs[k](torch.cat([z, side], -1)))
        h = h + torch.where(there, g * module.value_projs[k](side), 0.0)
    h = torch.where(present.any(-1, keepdim=True), h, 0.0)
    size = h.square().sum(-1, keepdim=True)
    length = torch.where(size > 0, size, 1.0).sqrt()
    alpha = torch.where(size > 0, module.beta * z.norm(dim=-1, keepdim=True) / length, 1.0)
    moved = z + alpha.clamp(max=1.0) * h
    return F.layer_norm(moved, (module.dim,), module.norm.weight, module.norm.bias, module.norm.eps)


def missing(module: AdaptationGate, *leading: int) -> Tensor:
    if not leading:
        return PRESENT[:, : len(module.side_dims)]
    return torch.rand(*leading, len(module.side_dims)) < 0.6


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_variant(variant: dict[str, Any], dtype: torch.dtype) -> None:
    module = gate(**variant, dtype=dtype)
    compare(module, call, eager, *streams(module))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("leading", [(B,), (B, N), (B, 2, 3)])
def test_missing_modalities(variant: dict[str, Any], leading: tuple[int, ...]) -> None:
    module = gate(**variant)
    for present in (missing(module), missing(module, *leading)):

        def mine(m: AdaptationGate, *xs: Tensor, present: Tensor = present) -> Tensor:
            return call(m, *xs, present=present)

        def theirs(m: AdaptationGate, *xs: Tensor, present: Tensor = present) -> Tensor:
            return eager(m, *xs, present=present)

        compare(module, mine, theirs, *streams(module, *leading))


def test_one_token_without_a_batch() -> None:
    module = gate()
    z, *sides = streams(module, 1)
    torch.testing.assert_close(module(z[0], [s[0] for s in sides]), module(z, sides)[0])


def test_the_formula_of_the_authors() -> None:
    """WasifurRahman/BERT_multimodal_transformer: side before text, eps beside |h|, no shift."""
    module = gate(bias=False, value_bias=True, beta=2.5)
    z, visual, acoustic = streams(module)
    displaced = torch.zeros_like(z)
    for k, side in enumerate((visual, acoustic)):
        weight = module.gate_projs[k].weight
        w_h = torch.cat([weight[:, C:], weight[:, :C]], dim=1)
        weight_side = F.relu(torch.cat((side, z), dim=-1) @ w_h.T)
        displaced = displaced + weight_side * module.value_projs[k](side)
    em_norm, hm_norm = z.norm(2, dim=-1), displaced.norm(2, dim=-1)
    hm_norm = torch.where(hm_norm == 0, torch.ones_like(hm_norm), hm_norm)
    threshold = em_norm / (hm_norm + 1e-6) * module.beta
    alpha = torch.min(threshold, torch.ones_like(threshold)).unsqueeze(-1)
    assert (alpha < 1).any() and (alpha == 1).any()
    expected = module.norm(alpha * displaced + z)
    torch.testing.assert_close(module(z, [visual, acoustic]), expected, rtol=1e-4, atol=1e-5)


# --- a missing modality ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("by_row", [False, True])
def test_a_missing_modality_contributes_exactly_nothing(
    variant: dict[str, Any], by_row: bool
) -> None:
    """The NaN that stands for it changes no bit of the result or of any gradient."""
    module = gate(**variant)
    z, *clean = streams(module)
    present = missing(module, B, N) if by_row else missing(module)
    results = []
    for filler in (0.0, float("nan"), float("inf")):
        text = z.clone().requires_grad_()
        sides = [
            s.masked_fill(~present[..., k, None].expand(s.shape) if by_row
                          else ~present[:, k].view(B, 1, 1).expand(s.shape), filler)
            for k, s in enumerate(clean)
        ]  # fmt: skip
        sides = [side.requires_grad_() for side in sides]
        out = module(text, sides, present)
        nothing = ~present.any(-1)
        torch.testing.assert_close(out[nothing], module.norm(z)[nothing])
        grads = gradients(out, module, text, *sides)
        for k, grad in enumerate(grads[1 : 1 + len(sides)]):
            assert (grad[~present[..., k]] == 0).all()
        results.append([out, *grads])
    for zeros, *others in zip(*results, strict=True):
        assert all(torch.equal(zeros, other) for other in others)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_modality_that_nobody_has(variant: dict[str, Any]) -> None:
    """None says the same as `present` False; its own weights get a gradient of exactly 0."""
    module = gate(**variant)
    z, *sides = streams(module)
    present = torch.ones(B, len(sides), dtype=torch.bool)
    present[:, 0] = False
    broken: list[Any] = [torch.full_like(sides[0], float("nan")), *sides[1:]]
    by_present = module(z, broken, present)
    grads = gradients(by_present, module)
    for also in (None, present):
        by_none = module(z, [None, *sides[1:]], also)
        torch.testing.assert_close(by_none, by_present)
        for a, b in zip(gradients(by_none, module), grads, strict=True):
            torch.testing.assert_close(a, b)
    named = dict(zip((n for n, _ in module.named_parameters()), grads, strict=True))
    for name, grad in named.items():
        if "_projs.0." in name:
            assert (grad == 0).all(), name


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nobody_has_anything(variant: dict[str, Any]) -> None:
    """LayerNorm(z), and nothing but the norm learns."""
    module = gate(**variant)
    z, *sides = streams(module)
    empty = torch.zeros(B, len(sides), dtype=torch.bool)
    broken = [torch.full_like(s, float("nan")) for s in sides]
    for out in (module(z, broken, empty), module(z, [None] * len(sides))):
        torch.testing.assert_close(out, module.norm(z))
        for (name, _), grad in zip(module.named_parameters(), gradients(out, module), strict=True):
            assert (grad != 0).any() if name.startswith("norm") else (grad == 0).all(), name


@pytest.mark.parametrize("shape", [(0,), (0, N), (B, 0)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    module = gate()
    z, *sides = streams(module, *shape)
    for present in (None, torch.zeros(shape[0], 2, dtype=torch.bool)):
        out = module(z, sides, present)
        assert out.shape == z.shape
        assert all((g == 0).all() for g in gradients(out, module))


# --- as a module -------------------------------------------------------------------------------


def test_dropout() -> None:
    module = gate(dropout=0.5)
    z, *sides = streams(module)
    expected = gate(dropout=0.0)
    expected.load_state_dict(module.state_dict())
    torch.testing.assert_close(module.eval()(z, sides), expected(z, sides))
    got = module.train()(z, sides)
    kept = got != 0
    assert 0.2 < kept.float().mean() < 0.8
    torch.testing.assert_close(got[kept], 2 * expected(z, sides)[kept])


@pytest.mark.parametrize("variant", VARIANTS[1:3], ids=str)
def test_as_a_module(variant: dict[str, Any]) -> None:
    z, *sides = streams(gate())
    made = check_module(
        lambda **options: AdaptationGate(C, SIDES, **variant, **options),
        lambda module: module(z, sides, PRESENT[:, :2]),
    )
    assert f"beta={made.beta}" in repr(made)


@pytest.mark.parametrize("variant", VARIANTS[1:3], ids=str)
def test_compile_autocast_gradcheck(variant: dict[str, Any]) -> None:
    module = gate(**variant)
    xs, present = streams(module), missing(module)

    def masked(module: AdaptationGate, *xs: Tensor) -> Tensor:
        return call(module, *xs, present=present)

    check_compiled(module, masked, *xs)
    assert check_autocast(module, masked, *xs).dtype == torch.float32  # as torch: z's
    leaves = tuple(x.double().requires_grad_() for x in xs)
    module = module.double()
    assert torch.autograd.gradcheck(lambda *xs: masked(module, *xs), leaves, fast_mode=True)


Z, S = torch.zeros(B, N, C), [torch.zeros(B, N, width) for width in SIDES]


@pytest.mark.parametrize(
    "z, sides, present, kind, message",
    [
        (None, S, None, TypeError, "z must be a torch.Tensor, got NoneType"),
        (Z[..., 1:], S, None, ValueError, "z has width 7 but the module was made for dim=8"),
        (Z, S[0], None, ValueError, "sides must be a list of 2 tensors .* got Tensor; give None"),
        (Z, S[:1], None, ValueError, "sides must be a list of 2 tensors .* got 1; give None"),
        (Z, [S[0], "a"], None, TypeError, r"sides\[1\] must be a torch.Tensor, got str"),
        (Z, [S[0], S[0]], None, ValueError, r"sides\[1\] has width 5 but .* side_dims\[1\]=2"),
        (Z, [S[0][1:], None], None, ValueError, r"sides\[0\] has shape \[3, 3, 5\] but z has"),
        (
            Z.half(),
            S,
            None,
            TypeError,
            r"z has dtype torch.float16 and sides\[0\] torch.float32 and",
        ),
        (Z, S, 1, TypeError, "present must be a torch.Tensor, got int; convert it"),
        (Z, S, torch.ones(B, 2), TypeError, "present must be a bool tensor, got torch.float32"),
        (Z, S, PRESENT.to("meta"), ValueError, "present is on meta but the module's inputs are on"),
        (Z, S, PRESENT, ValueError, r"present has shape \[4, 3\], expected \[4, 2\] .* or \[4, 3,"),
    ],
)
def test_errors(z: Any, sides: Any, present: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"AdaptationGate: {message}"):
        AdaptationGate(C, SIDES)(z, sides, present)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"side_dims": 4}, "side_dims is 4; it must hold the width of each side modality"),
        ({"side_dims": ()}, r"side_dims is \(\); it must hold the width of each side modality"),
        ({"side_dims": (4, 0)}, r"side_dims\[1\] is 0; it must be at least 1"),
        ({"dropout": -0.1}, "dropout is -0.1, expected 0 <= dropout < 1"),
        ({"beta": -1.0}, "beta is -1.0; it bounds a length and must be at least 0"),
        ({"beta": float("nan")}, "beta is nan; it bounds a length and must be at least 0"),
    ],
)
def test_constructor_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AdaptationGate: {message}"):
        AdaptationGate(**{"dim": C, "side_dims": SIDES, **options})


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(implementation).failed == 0
