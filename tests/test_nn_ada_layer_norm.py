"""`AdaLayerNorm` and `AdaLayerNormZero` against plain torch and transformers' own."""

from __future__ import annotations

import doctest
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import (
    check_autocast,
    check_compiled,
    check_module,
    check_parity,
    compare,
    loud,
    transformers_layers,
)
from torch import Tensor
from torch.func import functional_call

import mmfast.nn.ada_layer_norm as implementation
from mmfast.nn import AdaLayerNorm, AdaLayerNormZero

B, N, C, D = 3, 5, 10, 6


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def call(module: AdaLayerNorm, x: Tensor, cond: Tensor) -> Tensor:
    return module(x, cond)


def chunks(module: Any, cond: Tensor) -> list[dict[str, Tensor]]:
    """What `cond` says, one dict for each sublayer, per item as `[B, 1, dim]`."""
    values = F.silu(cond) if module.activation else cond
    values = F.linear(values, module.proj.weight, module.proj.bias)
    values = values[:, None] if cond.dim() == 2 else values
    width = len(module.order)
    parts = values.split(module.dim, dim=-1)
    return [
        dict(zip(module.order, parts[i : i + width], strict=True))
        for i in range(0, len(parts), width)
    ]


def normalise(module: Any, x: Tensor, index: int) -> Tensor:
    weight, bias = (
        p if p is None or p.dim() == 1 else p[index] for p in (module.weight, module.bias)
    )
    if module.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, module.eps)
    return F.rms_norm(x, x.shape[-1:], weight, module.eps)


def eager(module: AdaLayerNorm, x: Tensor, cond: Tensor) -> Tensor:
    (c,) = chunks(module, cond)
    return normalise(module, x, 0) * (1 + c["scale"]) + c["shift"]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm": "rms", "bias": False},
    {"elementwise_affine": True, "order": ("scale", "shift")},
    {"elementwise_affine": True, "norm": "rms", "activation": None},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("per_row", [False, True])
def test_every_variant(variant: dict[str, Any], dtype: torch.dtype, per_row: bool) -> None:
    module = loud(AdaLayerNorm(C, D, dtype=dtype, **variant))
    cond = torch.randn(B, N, D) if per_row else torch.randn(B, D)
    compare(module, call, eager, torch.randn(B, N, C), cond)


@pytest.mark.parametrize("shape", [(B, C), (B, 2, 4, C), (0, N, C), (B, 0, C)])
def test_any_leading_dims(shape: tuple[int, ...]) -> None:
    module = loud(AdaLayerNorm(C, D))
    x, cond = torch.randn(shape), torch.randn(shape[0], D)
    (c,) = chunks(module, cond)
    view = (shape[0], *(1,) * (len(shape) - 2), C)
    expected = normalise(module, x, 0) * (1 + c["scale"].view(view)) + c["shift"].view(view)
    torch.testing.assert_close(module(x, cond), expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_residual_and_gate(variant: dict[str, Any], gated: bool) -> None:
    module = loud(AdaLayerNorm(C, D, **variant))

    def theirs(module: Any, x: Tensor, cond: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
        h = residual + (gate[:, None] if gated else gate.sum() * 0 + 1) * x
        return torch.cat([eager(module, h, cond), h], dim=1)

    def mine(module: Any, x: Tensor, cond: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
        given = {"gate": gate} if gated else {}
        return torch.cat(tuple(module(x, cond, residual=residual, **given)), dim=1)

    x, residual = torch.randn(B, N, C), torch.randn(B, N, C)
    compare(module, mine, theirs, x, torch.randn(B, D), residual, torch.randn(B, C))


def test_it_starts_as_the_plain_norm() -> None:
    x, cond = torch.randn(B, N, C), torch.randn(B, D)
    torch.testing.assert_close(AdaLayerNorm(C, D)(x, cond), F.layer_norm(x, (C,), eps=1e-6))


# --- the zero variant --------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A block whose sublayers are two linear layers."""

    def __init__(self, device: Any = None, dtype: Any = None, **options: Any) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.ada = AdaLayerNormZero(C, D, **options, **factory)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(C, C, **factory) for _ in range(self.ada.sublayers)
        )

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.ada(x, cond, *self.layers)

    def reset_parameters(self) -> None:
        for module in (self.ada, *self.layers):
            module.reset_parameters()


def eager_block(block: Block, x: Tensor, cond: Tensor) -> Tensor:
    for i, (c, layer) in enumerate(zip(chunks(block.ada, cond), block.layers, strict=True)):
        x = x + c["gate"] * layer(normalise(block.ada, x, i) * (1 + c["scale"]) + c["shift"])
    return x


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "order" not in v], ids=str)
@pytest.mark.parametrize("sublayers", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_variants(variant: dict[str, Any], sublayers: int, dtype: torch.dtype) -> None:
    module = loud(Block(sublayers=sublayers, dtype=dtype, **variant))
    compare(module, call, eager_block, torch.randn(B, N, C), torch.randn(B, D))
    if dtype == torch.float32:
        compare(module, call, eager_block, torch.randn(B, N, C), torch.randn(B, N, D))


@pytest.mark.parametrize("order", list(itertools.permutations(("shift", "scale", "gate"))), ids=str)
def test_every_order_of_chunks(order: tuple[str, ...]) -> None:
    module = loud(Block(order=order))
    compare(module, call, eager_block, torch.randn(B, N, C), torch.randn(B, D))


@pytest.mark.parametrize("sublayers", [1, 2])
def test_a_zero_block_starts_as_the_identity(sublayers: int) -> None:
    x, cond = torch.randn(B, N, C), torch.randn(B, D)
    module = Block(sublayers=sublayers)
    out = module(x, cond)
    assert torch.equal(out, x)
    out.square().sum().backward()
    assert module.ada.proj.weight.grad.abs().sum() > 0  # and learns


def test_the_modulation_for_whoever_composes_the_ops() -> None:
    module = loud(AdaLayerNormZero(C, D))
    cond = torch.randn(B, D)
    parts = module.modulation(cond)
    assert len(parts) == 6
    torch.testing.assert_close(torch.cat(parts, -1), module.proj(F.silu(cond)))


# --- transformers ------------------------------------------------------------------------------


def test_qwen_omni_final() -> None:
    omni = transformers_layers("qwen2_5_omni")
    layer = omni.Qwen2_5_OmniAdaLayerNormZero_Final(C)
    module = loud(AdaLayerNorm(C, order=("scale", "shift")))

    def theirs(module: AdaLayerNorm, x: Tensor, cond: Tensor) -> Tensor:
        weights = {f"linear.{n}": p for n, p in module.proj.named_parameters()}
        return functional_call(layer, weights, (x, cond), strict=True)

    check_parity(module, call, theirs, torch.randn(B, N, C), torch.randn(B, C))


def test_qwen_omni_dit_block() -> None:
    """`Qwen2_5_OmniAdaLayerNormZero` in the arithmetic of its decoder layer."""
    omni = transformers_layers("qwen2_5_omni")
    layer = omni.Qwen2_5_OmniAdaLayerNormZero(C)
    attention, mlp = torch.nn.Linear(C, C), omni.DiTMLP(C, mult=2).eval()

    def mine(module: AdaLayerNormZero, x: Tensor, cond: Tensor) -> Tensor:
        return module(x, cond, attention, mlp)

    def theirs(module: AdaLayerNormZero, x: Tensor, cond: Tensor) -> Tensor:
        weights = {f"linear.{n}": p for n, p in module.proj.named_parameters()}
        norm, *rest = functional_call(layer, weights, (x, cond), strict=True)
        gate_msa, shift_mlp, scale_mlp, gate_mlp = rest
        x = x + gate_msa.unsqueeze(1) * attention(norm)
        ff_norm = F.layer_norm(x, (C,), eps=1e-6)
        norm = ff_norm * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        return x + gate_mlp.unsqueeze(1) * mlp(norm)

    module = loud(AdaLayerNormZero(C))
    check_parity(module, mine, theirs, torch.randn(B, N, C), torch.randn(B, C))


def test_vibevoice_head_layer() -> None:
    """One sublayer, RMS normalisation with a weight, a condition for each row, no bias."""
    vibevoice = transformers_layers("vibevoice")
    config = SimpleNamespace(
        hidden_size=C, intermediate_size=7, hidden_act="silu", rms_norm_eps=1e-5, mlp_bias=False
    )
    layer = loud(vibevoice.VibeVoiceDiffusionHeadAdaLayerNorm(config))
    module = AdaLayerNormZero(
        C, sublayers=1, norm="rms", eps=1e-5, elementwise_affine=True, bias=False
    )
    names = {"weight": "norm.weight", "proj.weight": "linear.weight"}

    def theirs(module: AdaLayerNormZero, x: Tensor, cond: Tensor) -> Tensor:
        weights = {names[name]: p for name, p in module.named_parameters()}
        return functional_call(layer, weights, (x, cond))

    x, cond = torch.randn(B, N, C), torch.randn(B, N, C)
    check_parity(loud(module), lambda m, x, c: m(x, c, layer.ffn), theirs, x, cond)


# --- as a module -------------------------------------------------------------------------------


def test_as_a_module() -> None:
    x, cond = torch.randn(B, N, C), torch.randn(B, D)
    made = check_module(
        lambda **options: AdaLayerNorm(C, D, elementwise_affine=True, **options),
        lambda module: module(x, cond),
    )
    assert "order=('shift', 'scale')" in repr(made)
    made = check_module(
        lambda **options: AdaLayerNormZero(C, D, norm="rms", **options),
        lambda module: module(x, cond, torch.tanh, torch.sin),
    )
    assert "norm='rms'" in repr(made)


def test_compile_autocast_gradcheck() -> None:
    x, cond = torch.randn(B, N, C), torch.randn(B, D)
    for module in (loud(AdaLayerNorm(C, D, elementwise_affine=True)), loud(Block())):
        check_compiled(module, call, x, cond)
        assert check_autocast(module, call, x, cond).dtype == torch.float32  # as torch: x's
        leaves = (x.double().requires_grad_(), cond.double().requires_grad_())
        assert torch.autograd.gradcheck(module.double(), leaves, fast_mode=True)


X, Y = torch.zeros(B, N, C), torch.zeros(B, D)


@pytest.mark.parametrize(
    "x, cond, options, kind, message",
    [
        ([], Y, {}, TypeError, "AdaLayerNorm: x must be a torch.Tensor, got list"),
        (X, None, {}, TypeError, "AdaLayerNorm: cond must be a torch.Tensor, got NoneType"),
        (X[..., 1:], Y, {}, ValueError, "AdaLayerNorm: x has width 9 but .* dim=10"),
        (X, Y[:, 1:], {}, ValueError, "AdaLayerNorm: cond has width 5 but .* cond_dim=6"),
        (X, Y[1:], {}, ValueError, r"AdaLayerNorm: cond has shape \[2, 6\] but x has shape"),
        (X, Y.half(), {}, TypeError, "AdaLayerNorm: cond has dtype torch.float16, but the weights"),
        (X, Y, {"gate": X}, ValueError, "modulate: gate comes without a residual; give"),
        (X, Y, {"residual": X[1:]}, ValueError, r"modulate: residual has shape \[2, 5, 10\] but"),
        (X, Y, {"residual": X, "gate": Y}, ValueError, r"modulate: gate has shape \[3, 6\] but"),
    ],
)
def test_errors(
    x: Any, cond: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        AdaLayerNorm(C, D)(x, cond, **options)


def test_zero_errors() -> None:
    with pytest.raises(ValueError, match=r"AdaLayerNormZero: got 1 sublayers but .* sublayers=2"):
        AdaLayerNormZero(C, D)(X, Y, torch.tanh)
    with pytest.raises(ValueError, match="AdaLayerNormZero: cond has width 5 but"):
        AdaLayerNormZero(C, D)(X, Y[:, 1:], torch.tanh, torch.tanh)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"cond_dim": 0}, "cond_dim is 0; it must be at least 1"),
        ({"norm": None}, "norm is None; it must be 'layer' or 'rms'"),
        ({"activation": "gelu"}, "activation is 'gelu'; it must be 'silu' or None"),
        ({"order": ("shift",)}, r"order is \('shift',\); it must hold each of \('shift', 'scale'"),
    ],
)
@pytest.mark.parametrize("kind", [AdaLayerNorm, AdaLayerNormZero])
def test_constructor_errors(kind: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        kind(**{"dim": C, "cond_dim": D, **options})


def test_sublayers_are_counted() -> None:
    with pytest.raises(ValueError, match="AdaLayerNormZero: sublayers is 0; it must be at least 1"):
        AdaLayerNormZero(C, D, sublayers=0)


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(implementation).failed == 0
