"""`mmfast.nn.FiLM` against plain torch, and against CLIPSeg's modulation."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
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

import mmfast.nn.film as implementation
from mmfast.nn import FiLM

B, C, D = 3, 10, 6


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def call(module: FiLM, x: Tensor, cond: Tensor) -> Tensor:
    return module(x, cond)


def eager(module: FiLM, x: Tensor, cond: Tensor) -> Tensor:
    gamma, beta = module.proj(cond).split(module.channels, dim=-1)
    last = x.movedim(module.channel_dim, -1)
    if cond.dim() == 2 and last.dim() > 2:
        shape = (len(cond), *(1,) * (last.dim() - 2), module.channels)
        gamma, beta = gamma.view(shape), beta.view(shape)
    out = (1 + gamma if module.delta else gamma) * last + beta
    return out.movedim(-1, module.channel_dim)


SHAPES = [
    ((B, C), (B, D)),
    ((B, 5, C), (B, D)),
    ((B, 5, C), (B, 5, D)),
    ((B, 5, C), (B, 1, D)),
    ((B, 5, C), (1, 5, D)),
    ((B, 2, 4, C), (B, D)),
    ((B, 2, 4, C), (B, 1, 4, D)),
    ((C,), (D,)),
    ((0, 5, C), (0, D)),
    ((B, 0, C), (B, D)),
]


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("shape, cond", SHAPES, ids=str)
def test_every_shape(delta: bool, shape: tuple[int, ...], cond: tuple[int, ...]) -> None:
    module = loud(FiLM(D, C, delta=delta))
    compare(module, call, eager, torch.randn(shape), torch.randn(cond))


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_every_dtype(delta: bool, dtype: torch.dtype, bias: bool) -> None:
    module = loud(FiLM(D, C, delta=delta, bias=bias, dtype=dtype))
    compare(module, call, eager, torch.randn(B, 5, C), torch.randn(B, D))


@pytest.mark.parametrize("delta", [True, False])
def test_images(delta: bool) -> None:
    module = loud(FiLM(D, C, delta=delta, channel_dim=1))
    x, cond = torch.randn(B, C, 4, 5), torch.randn(B, D)
    compare(module, call, eager, x, cond)
    compare(module, call, eager, torch.randn(B, C), cond)
    out = module(x.to(memory_format=torch.channels_last), cond)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, module(x, cond))


def test_a_small_gamma_is_not_rounded_away() -> None:
    """gamma - 1 in bfloat16, or even float32, would lose it."""
    for dtype in (torch.bfloat16, torch.float32):
        module = FiLM(D, C, delta=False, dtype=dtype)
        with torch.no_grad():
            module.proj.weight.mul_(1e-6)
            module.proj.bias.zero_()
        x, cond = torch.randn(B, 5, C, dtype=dtype), torch.randn(B, D, dtype=dtype)
        expected = eager(module.double(), x.double(), cond.double())
        got = module.to(dtype)(x, cond)
        eps = torch.finfo(dtype).eps
        assert (got - expected).abs().max() < 8 * eps * expected.abs().max()


def test_half_precision_features_beside_float32_weights() -> None:
    module = loud(FiLM(D, C))
    x, cond = torch.randn(B, 5, C), torch.randn(B, D)
    got = module(x.bfloat16(), cond)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), module(x, cond), rtol=0.02, atol=0.05)
    module = loud(FiLM(D, C, delta=False))
    assert module(x.bfloat16(), cond).dtype == torch.bfloat16


def test_it_starts_near_the_identity() -> None:
    for delta in (True, False):
        module = FiLM(D, C, delta=delta)
        x = torch.randn(B, 5, C)
        assert torch.equal(module(x, torch.zeros(B, D)), x)


def test_clipseg() -> None:
    """`film_mul(cond) * x.permute(1, 0, 2) + film_add(cond)`, as its decoder does."""
    clipseg = transformers_layers("clipseg")
    config = clipseg.CLIPSegConfig(
        projection_dim=D, reduce_dim=C, extract_layers=[1], decoder_num_attention_heads=2,
        decoder_intermediate_size=7, vision_config={"hidden_size": 8, "num_attention_heads": 2},
    )  # fmt: skip
    decoder = clipseg.CLIPSegDecoder(config)
    module = loud(FiLM(D, C, delta=False))

    def theirs(module: FiLM, x: Tensor, cond: Tensor) -> Tensor:
        def film(layer: torch.nn.Linear, half: int) -> Tensor:
            weights = {n: p.chunk(2)[half] for n, p in module.proj.named_parameters()}
            return functional_call(layer, weights, (cond,), strict=True)

        mul, add = film(decoder.film_mul, 0), film(decoder.film_add, 1)
        return (mul * x.permute(1, 0, 2) + add).permute(1, 0, 2)

    check_parity(module, call, theirs, torch.randn(B, 7, C), torch.randn(B, D))


# --- as a module -------------------------------------------------------------------------------


def test_as_a_module() -> None:
    x, cond = torch.randn(B, 5, C), torch.randn(B, D)
    for delta in (True, False):
        made = check_module(
            lambda delta=delta, **options: FiLM(D, C, delta=delta, **options),
            lambda module: module(x, cond),
        )
        assert f"delta={delta}" in repr(made)


@pytest.mark.parametrize("delta", [True, False])
def test_compile_autocast_gradcheck(delta: bool) -> None:
    module = loud(FiLM(D, C, delta=delta))
    x, cond = torch.randn(B, 5, C), torch.randn(B, D)
    check_compiled(module, call, x, cond)
    assert check_autocast(module, call, x, cond).dtype == torch.float32  # as torch: x's
    leaves = (x.double().requires_grad_(), cond.double().requires_grad_())
    assert torch.autograd.gradcheck(module.double(), leaves, fast_mode=True)


X, Y = torch.zeros(B, 5, C), torch.zeros(B, D)


@pytest.mark.parametrize(
    "x, cond, kind, message",
    [
        (None, Y, TypeError, "x must be a torch.Tensor, got NoneType"),
        (X, 1.0, TypeError, "cond must be a torch.Tensor, got float"),
        (X[..., 1:], Y, ValueError, "x has width 9 but the module was made for channels=10; both"),
        (X, Y[:, 1:], ValueError, "cond has width 5 but the module was made for cond_dim=6"),
        (X, Y[1:], ValueError, r"cond has shape \[2, 6\] but x has shape \[3, 5, 10\]; give one"),
        (X, Y[0], ValueError, r"cond has shape \[6\] but x has .* each item \[B, 6\], or one"),
        (X, Y[:, None, None], ValueError, r"cond has shape \[3, 1, 1, 6\] but x has"),
        (
            X,
            Y.double(),
            TypeError,
            "cond has dtype torch.float64, but the weights are torch.float32",
        ),
    ],
)
def test_errors(x: Any, cond: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"FiLM: {message}"):
        FiLM(D, C)(x, cond)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cond_dim": 0}, "cond_dim is 0; it must be at least 1"),
        ({"channels": 0}, "channels is 0; it must be at least 1"),
        ({"channel_dim": 2}, "channel_dim is 2; it must be -1 or 1"),
    ],
)
def test_constructor_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"FiLM: {message}"):
        FiLM(**{"cond_dim": D, "channels": C, **options})


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(implementation).failed == 0
