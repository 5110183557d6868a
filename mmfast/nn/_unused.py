"""Gradients of 0 for parameters that nothing used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Touch(torch.autograd.Function):
    """`x`, on which the parameters depend with a derivative of 0. Nothing is computed for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        zeros = (torch.zeros((), dtype=t, device=d).expand(shape) for shape, t, d in ctx.like)
        return grads[0], *zeros


def touch(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """x itself. Its backward gives every parameter that wants a gradient one of 0 at least.

    DistributedDataParallel waits for a gradient of each.
    """
    wanted = [p for p in parameters if p.requires_grad]
    return _Touch.apply(x, *wanted) if wanted and torch.is_grad_enabled() else x
