"""The plain eager twins of the gating ops: what people write today, in the storage dtype.

They are the peers of the tolerance rule and of the benchmarks. Unlike `mmfast.reference` they keep
every intermediate in the dtype of the data, and let NaN in masked places through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfast.reference._compute import per_item
from mmfast.reference.activations import GATE_ACTIVATIONS, GLU_ACTIVATIONS
from mmfast.reference.fuse import spread_logits
from mmfast.reference.modulate import ModulateOutput


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    activation: str = "tanh",
    row_mask: Tensor | None = None,
) -> Tensor:
    """`x + row_mask * act(gate) * y`."""
    branch = GATE_ACTIVATIONS[activation](per_item(gate, x)) * y
    if row_mask is not None:
        branch = branch * row_mask.unsqueeze(-1)
    return (x + branch).to(x.dtype)


def glu(a: Tensor, b: Tensor, activation: str = "silu") -> Tensor:
    """`act(a) * b`."""
    return GLU_ACTIVATIONS[activation](a) * b


def glu_packed(ab: Tensor, activation: str = "silu") -> Tensor:
    """`act(a) * b` of two halves."""
    a, b = ab.chunk(2, dim=-1)
    return GLU_ACTIVATIONS[activation](a) * b


def fuse(
    features: Sequence[Tensor], logits: Tensor, *, mode: str, present: Tensor | None = None
) -> Tensor:
    """Weights, a stack, a sum; for the pair of a GMU its formula."""
    x = features[0]
    pair, logits = spread_logits(logits, x, len(features), mode)
    there = None
    if present is not None:
        there = present.reshape(present.shape[0], *(1,) * (x.dim() - 2), len(features), 1)
    if pair:
        z = torch.sigmoid(logits.squeeze(-2))
        first, second = z * torch.tanh(features[0]), (1 - z) * torch.tanh(features[1])
        if there is not None:
            first, second = first * there[..., 0, :], second * there[..., 1, :]
        return (first + second).to(x.dtype)
    stacked = torch.stack(list(features), dim=-2)
    if mode == "softmax":
        if there is not None:
            logits = logits.masked_fill(~there, float("-inf"))
        weights = logits.softmax(dim=-2)
        if there is not None:  # the usual workaround for items that have nothing
            weights = weights.masked_fill(~there, 0.0)
    else:
        weights = torch.sigmoid(logits)
        if there is not None:
            weights = weights * there
    if mode == "gmu":
        stacked = torch.tanh(stacked)
    return (weights * stacked).sum(dim=-2).to(x.dtype)


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
    """PyTorch's own norms, then `* (1 + scale) + shift`."""
    h = x
    if residual is not None:
        h = residual + (x if gate is None else per_item(gate, x) * x)
        h = h.to(x.dtype)
    u = h
    if norm == "layer":
        u = F.layer_norm(h, h.shape[-1:], None, None, eps)
    elif norm == "rms":
        u = F.rms_norm(h, h.shape[-1:], None, eps)
    if weight is not None:
        u = u * weight
    if bias is not None:
        u = u + bias
    if scale is not None:
        u = u * (1 + per_item(scale, x))
    if shift is not None:
        u = u + per_item(shift, x)
    out = u.to(x.dtype)
    return out if residual is None else ModulateOutput(out, h)


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
    """As published, without the epsilon."""
    if row_mask is not None:
        h = h * row_mask.unsqueeze(-1)
    longest, length = z.norm(dim=-1, keepdim=True), h.norm(dim=-1, keepdim=True)
    length = torch.where(length == 0, torch.ones_like(length), length)
    alpha = torch.clamp(beta * longest / length, max=1.0)
    alpha = torch.where((h == 0).all(-1, keepdim=True), torch.ones_like(alpha), alpha)
    y = F.layer_norm(z + alpha * h, z.shape[-1:], None, None, eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(z.dtype)
