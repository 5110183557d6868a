"""The meaning of `modulate` in plain torch: every backend must agree with this file."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.reference._compute import compute_dtype, full_precision, per_item


class ModulateOutput(NamedTuple):
    """What `modulate` returns when a residual is given: the result and the new residual stream."""

    out: Tensor
    h: Tensor


def modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: str | None = "layer",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | ModulateOutput:
    """`(norm(h) * weight + bias) * (1 + scale) + shift`, h = x or `residual + gate * x`.

    The arguments are those of `mmfast.modulate`, which documents and checks them; here they are
    taken on trust. h is rounded to the storage dtype before it is normalised, as the stream that
    the next layer reads is.
    """
    with full_precision(x):
        acc = compute_dtype(x)
        h = x
        if residual is not None:
            branch = x.to(acc)
            if gate is not None:
                branch = per_item(gate, x).to(acc) * branch
            h = (residual.to(acc) + branch).to(x.dtype)
        u = _normalise(h.to(acc), norm, eps)
        if weight is not None:
            u = u * weight.to(acc)
        if bias is not None:
            u = u + bias.to(acc)
        if scale is not None:
            u = u * (1.0 + per_item(scale, x).to(acc))
        if shift is not None:
            u = u + per_item(shift, x).to(acc)
        out = u.to(x.dtype)
    return out if residual is None else ModulateOutput(out, h)


def _normalise(h: Tensor, norm: str | None, eps: float) -> Tensor:
    if norm is None:
        return h
    if norm == "layer":
        h = h - h.mean(dim=-1, keepdim=True)
    return h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
