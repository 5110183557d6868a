"""What the tests of `mmfast.nn` share: loud weights, a call counter, one comparison."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

import mmfast
from mmfast.testing.tolerance import GRADIENT_FACTOR

M = TypeVar("M", bound=torch.nn.Module)


class Calls:
    """Stands in for `cross_attention`: counts its calls and keeps the arguments of the last."""

    def __init__(self) -> None:
        self.count = 0
        self.last: dict[str, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        self.count += 1
        self.last = {"q": q, "k": k, "v": v, **options}
        return mmfast.cross_attention(q, k, v, **options)


def loud(module: M) -> M:
    """Weights ~ N(0, 1.6 / sqrt(fan_in)): attention is neither uniform nor one-hot."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else 2.0
            parameter.normal_(0.0, 1.6 / fan_in**0.5)
    return module


def assert_near(name: str, got: Tensor, exact: Tensor, eager: Tensor | None) -> None:
    """`got` is within 3 times the error that `eager`, in the same dtype, makes, plus rounding.

    `exact` is float64. The floor is the rounding of a chain of three products whose terms are of
    size 1: a gradient that cancels to 0 (that of the key bias) is all rounding. Where `eager` is
    NaN (PyTorch in a row that sees nothing) only the floor counts. Infinities must match.
    """
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    live = exact.isfinite()
    assert torch.equal(got.isfinite(), live), f"{name}: NaN or infinity out of place"
    if not live.any():
        return
    eps = torch.finfo(got.dtype if eager is None else eager.dtype).eps
    allowed = 128 * eps * exact[live].abs().max().clamp(min=1.0)
    if eager is not None and not eager.isnan().any():
        allowed = allowed + GRADIENT_FACTOR * (eager.double() - exact)[live].abs().max()
    error = (got.double() - exact)[live].abs().max()
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
