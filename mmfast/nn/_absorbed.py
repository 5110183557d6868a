"""Projections of keys and values absorbed into the queries and the result.

For head h with key/value head g::

    q_h (C W_k,g^T + b_k,g)^T = (q_h W_k,g) C^T + q_h b_k,g
    P_h (C W_v,g^T + b_v,g)   = (P_h C) W_v,g^T + sum_m P_h b_v,g

so that the attention runs on the context C itself, with queries of its width, and the context is
neither projected nor copied: worth it where the queries are few. The second term of the scores is
the same for all keys of a row: the softmax does not see it, the log-sum-exp does. The sum of the
weights of a row is 1, 0 in a row that sees nothing, and under dropout that of what is left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmfast.ops._autograd import in_eager


class Absorbed(NamedTuple):
    """The projections of keys and values, head by head, as views of the weights."""

    k: Tensor
    """`[G, D, C]`"""
    k_bias: Tensor | None
    """`[G * D]`"""
    v: Tensor
    """`[G, Dv, C]`"""
    v_bias: Tensor | None
    """`[G * Dv]`"""


class _Untouched(torch.autograd.Function):
    """x; the gradient of `parameter` is 0, not None, as that of a key bias is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (parameter,) = ctx.saved_tensors
        return grads[0], torch.zeros_like(parameter)


def keep_in_graph(x: Tensor, parameter: Tensor | None) -> Tensor:
    """x, with a gradient of 0 for a parameter that the result does not depend on.

    The projected form gives the key bias such a gradient (its terms cancel), and
    DistributedDataParallel waits for one from every parameter.
    """
    if parameter is None or not (torch.is_grad_enabled() and parameter.requires_grad):
        return x
    if in_eager() and forward_ad._current_level < 0:
        return _Untouched.apply(x, parameter)
    return x + (parameter * 0.0).sum().to(x.dtype)


def absorb_queries(q: Tensor, weights: Tensor) -> Tensor:
    """Queries `[R, H, D]` through the key projection `[G, D, C]` -> `[H, R, C]`, dense."""
    R, H, D = q.shape
    G, _, C = weights.shape
    if H == G:
        return torch.bmm(q.transpose(0, 1), weights)
    grouped = q.view(R, G, H // G, D).permute(1, 2, 0, 3).reshape(G, H // G * R, D)
    return torch.bmm(grouped, weights).view(H, R, C)


def project_attended(
    attended: Tensor, weights: Tensor, bias: Tensor | None, row_sums: Tensor | None
) -> Tensor:
    """`P C` `[H, R, C]` through the value projection `[G, Dv, C]` -> `[R, H, Dv]`, dense.

    bias: `[G * Dv]`, times `row_sums` `[H, R]`, or 1.
    """
    H, R, C = attended.shape
    G, Dv, _ = weights.shape
    # The weights on the left: their gradient comes out dense, laid out as they are.
    columns = attended.reshape(G, H // G * R, C).transpose(1, 2)
    if bias is None:
        projected = torch.bmm(weights, columns)
    elif row_sums is None:
        projected = torch.baddbmm(bias.view(G, Dv, 1), weights, columns)
    else:
        projected = torch.bmm(weights, columns)
        projected = projected + bias.view(G, Dv, 1) * row_sums.reshape(G, 1, H // G * R)
    return projected.view(G, Dv, H // G, R).permute(3, 0, 2, 1).reshape(R, H, Dv)


def key_bias_scores(q: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`[R, H]`: what the key bias `[G * D]` adds to all scores of a row of queries `[R, H, D]`."""
    H, D = q.shape[1:]
    wide = torch.promote_types(q.dtype, torch.float32)
    per_head = bias.to(wide).view(-1, D).repeat_interleave(H * D // bias.shape[0], dim=0)
    return (q.to(wide) * per_head).sum(-1) * scale
