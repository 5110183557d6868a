"""The meaning of `fuse` in plain torch: every backend must agree with this file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.reference._compute import compute_dtype, full_precision


def fuse(
    features: Sequence[Tensor],
    logits: Tensor,
    *,
    mode: str,
    present: Tensor | None = None,
) -> Tensor:
    """The gated sum of K features, absent ones left out, computed in float32 and rounded once.

    The arguments are those of `mmfast.fuse`, which documents and checks them; here they are taken
    on trust.
    """
    x = features[0]
    pair, logits = spread_logits(logits, x, len(features), mode)
    with full_precision(x):
        acc = compute_dtype(x)
        terms = torch.stack([feature.to(acc) for feature in features], dim=-2)
        logits = logits.to(acc)
        there = torch.ones(1, 1, dtype=torch.bool, device=x.device)
        if present is not None:  # [B, 1, ..., K, 1]
            there = present.reshape(present.shape[0], *(1,) * (x.dim() - 2), len(features), 1)
        terms = torch.where(there, terms, 0.0)
        if pair:
            z = torch.where(there.any(-2, keepdim=True), logits, 0.0)
            weights = torch.cat([torch.sigmoid(z), torch.sigmoid(-z)], dim=-2)
        elif mode == "softmax":
            weights = _softmax(logits, there)
        else:
            weights = torch.sigmoid(torch.where(there, logits, 0.0))
        if mode == "gmu":
            terms = torch.tanh(terms)
        return (torch.where(there, weights, 0.0) * terms).sum(dim=-2).to(x.dtype)


def spread_logits(logits: Tensor, x: Tensor, K: int, mode: str) -> tuple[bool, Tensor]:
    """The logits as a view that broadcasts to `[B, ..., K, C]`, at full rank.

    The first result says that there is one logit for a pair of modalities, `[B, ..., 1, C or 1]`:
    the gate z of a gated multimodal unit.
    """
    rank = x.dim()
    if mode == "gmu" and K == 2 and logits.dim() == rank and is_pair(logits, x):
        return True, logits.unsqueeze(-2)
    if logits.dim() == rank + 1:  # [B, ..., K, C]
        return False, logits
    if logits.dim() == 2 and rank > 2:  # [B, K]
        logits = logits.reshape(logits.shape[0], *(1,) * (rank - 2), logits.shape[1])
    return False, logits.reshape(*(1,) * (rank - logits.dim()), *logits.shape, 1)


def is_pair(logits: Tensor, x: Tensor) -> bool:
    """Is the last dim of `[B, ..., L]` the channels (or one for all), not the K = 2 modalities?"""
    return logits.shape[-1] == 1 or logits.shape[-1] == x.shape[-1]


def _softmax(logits: Tensor, there: Tensor) -> Tensor:
    """Softmax over dim -2 of what is there, 0 where nothing is.

    A logit of -inf has weight 0. Where one is +inf it takes all the weight (several share it), and
    the gradient is 0.
    """
    infinity = float("inf")
    logits = torch.where(there, logits, -infinity)
    most = logits.detach().amax(dim=-2, keepdim=True)
    ahead = most == infinity
    shifted = torch.where(logits.isinf(), 0.0, logits - torch.where(most.isinf(), 0.0, most))
    raw = torch.where(logits == -infinity, 0.0, torch.exp(shifted))
    raw = torch.where(ahead, (logits == infinity).to(raw.dtype), raw)
    total = raw.sum(dim=-2, keepdim=True)
    return raw / torch.where(total == 0, 1.0, total)
