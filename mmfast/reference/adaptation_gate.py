"""The meaning of `adaptation_gate` in plain torch: every backend must agree with this file."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.reference._compute import channel_mask, compute_dtype, full_precision


def adaptation_gate(
    z: Tensor,
    h: Tensor,
    *,
    beta: float = 1.0,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> Tensor:
    """`LayerNorm(z + alpha * h)`, `alpha = min(beta * |z| / |h|, 1)` in each row.

    The arguments are those of `mmfast.adaptation_gate`, which documents and checks them; here they
    are taken on trust.
    """
    with full_precision(z):
        acc = compute_dtype(z)
        y, moved = z.to(acc), h.to(acc)
        keep = channel_mask(row_mask)
        if keep is not None:
            moved = moved.masked_fill(~keep, 0.0)
        size = _norm(moved)
        ratio = beta * _norm(y) / torch.where(size > 0, size, 1.0)
        alpha = torch.where((size > 0) & (ratio < 1), ratio, 1.0)
        y = y + alpha * moved
        y = y - y.mean(dim=-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
        if weight is not None:
            y = y * weight.to(acc)
        if bias is not None:
            y = y + bias.to(acc)
        return y.to(z.dtype)


def _norm(x: Tensor) -> Tensor:
    """The 2-norm of each row `[..., 1]`, with gradient 0 (not NaN, to any order) where it is 0."""
    squares = x.square().sum(dim=-1, keepdim=True)
    is_zero = squares == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squares).sqrt())
