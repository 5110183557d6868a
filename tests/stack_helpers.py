"""What the tests of the transformer layers and stacks share: twins, runs, comparisons, masks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nn_helpers import assert_near, loud
from torch import Tensor

import mmfast.nn._layer_streams as streams

B, N, M, C, H, FF = 3, 5, 7, 16, 2, 24
INF = float("inf")
N_LENS, M_LENS = torch.tensor([5, 2, 3]), torch.tensor([4, 6, 1])


@pytest.fixture(name="packing", params=["packed", "padded"])
def forced_packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small batches are packed, or never are (the way of compilation and of accelerators)."""
    monkeypatch.setattr(streams, "_SMALL", -1 if request.param == "packed" else 2**62)
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")
        warnings.filterwarnings("ignore", "Support for mismatched")
        yield


def padding(lens: Tensor, length: int) -> Tensor:
    return torch.arange(length) >= lens[:, None]


def holes(length: int, batch: int = B) -> Tensor:
    """Padding anywhere; every item keeps a row that is not its first."""
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[:, 0], mask[:, 2] = True, False
    return mask


def as_float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -INF)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def quiet_norms(module: Any) -> Any:
    """Loud weights, but norms that do not blow the streams up."""
    loud(module)
    for part in module.modules():
        if isinstance(part, torch.nn.LayerNorm):
            with torch.no_grad():
                part.weight.uniform_(0.5, 1.5)
    return module


def run(
    module: Any, call: Callable[..., Any], inputs: list[Tensor], where: Tensor | None = None
) -> dict[str, Tensor]:
    """Result and all gradients of a fixed projection of it; `where`: rows that do not count."""
    dtype = next(module.parameters()).dtype
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    out = call(module, *leaves)
    if where is not None:
        out = out.masked_fill(where.unsqueeze(-1), 0.0)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    named = list(module.named_parameters())
    tensors = [*leaves, *(p for _, p in named)]
    grads = torch.autograd.grad((out * direction).sum(), tensors, allow_unused=True)
    names = [f"dinput{i}" for i in range(len(leaves))] + [f"d{name}" for name, _ in named]
    results = {"out": out.detach()}
    for name, leaf, grad in zip(names, tensors, grads, strict=True):
        results[name] = torch.zeros_like(leaf) if grad is None else grad
    return results


def check(
    theirs: Any,
    ours: Any,
    call: Callable[..., Any],
    inputs: list[Tensor],
    where: Tensor | None = None,
    reference: Callable[..., Any] | None = None,
) -> None:
    """Ours is as close to `theirs` in float64 as `theirs` in float32 is, times 3."""
    reference = call if reference is None else reference
    exact = run(copy.deepcopy(theirs).double(), reference, inputs, where)
    eager = run(theirs, reference, inputs, where)
    got = run(ours, call, inputs, where)
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        # The gradient of a key bias is a sum that cancels to 0.
        size = 4.0 if name.endswith("in_proj_bias") else 1.0
        assert_near(name, got[name], expected, eager[name], size)


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Two ways to one result, gradients included."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        size = max(1.0, float(value.abs().max()) if value.numel() else 1.0)
        torch.testing.assert_close(
            b[name], value, rtol=0, atol=tolerance * size, msg=lambda text, n=name: f"{n}: {text}"
        )
