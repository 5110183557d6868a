"""The plain eager twin of `cross_attention`: what people write today, in the storage dtype.

It is the peer of the tolerance rule (an op may be at most a few times less exact than this) and of
the benchmarks. Unlike `mmfast.reference` it keeps every intermediate in the dtype of q, as models
do, and lets NaN in padding through, as they do too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.reference.cross_attention import CrossAttentionOutput, allowed_pairs
from mmfast.reference.philox import dropout_keep


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    segment_rule: str = "equal",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    gate: Tensor | None = None,
    return_lse: bool = False,
    return_importance: bool = False,
    return_weights: bool | str = False,
) -> Tensor | CrossAttentionOutput:
    """The arguments and results of `mmfast.cross_attention`, with a score matrix in memory."""
    B, H, N, D = q.shape
    G, M = k.shape[1], k.shape[2]
    if G != H:
        k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
    scale = D**-0.5 if scale is None else scale
    allowed = _mask(q, k, kv_lens, q_lens, q_segments, kv_segments, segment_rule, mask, is_causal)
    scores = _scores(q, k, scale, bias, allowed)
    p = _softmax(scores, can_be_blind=allowed is not None or bias is not None)
    dropped = p
    if dropout_p > 0.0:
        seed = torch.randint(0, 2**63 - 1, (1,), device=q.device)
        dropped = p * dropout_keep(seed, dropout_p, B, H, N, M) / (1.0 - dropout_p)
    out = dropped @ v
    if gate is not None:
        logits = gate.to(q.dtype).transpose(1, 2)
        out = out * torch.sigmoid(logits if gate.dim() == 4 else logits[..., None])
    if not (return_lse or return_importance or return_weights):
        return out

    # LSE and importance are float32 results, for which nobody would start from rounded scores.
    full = scores
    if q.dtype in (torch.float16, torch.bfloat16):
        full = _scores(q.float(), k.float(), scale, bias, allowed)
    weights = None
    if return_weights:
        weights = p if return_weights == "per_head" else p.mean(dim=1)
    return CrossAttentionOutput(
        out,
        full.logsumexp(dim=-1) if return_lse else None,
        _softmax(full, can_be_blind=True).sum(dim=2) if return_importance else None,
        weights,
    )


def _scores(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None, allowed: Tensor | None
) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) * scale
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    return scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))


def _softmax(scores: Tensor, can_be_blind: bool) -> Tensor:
    p = scores.softmax(dim=-1)
    if can_be_blind:  # the usual workaround for rows that see nothing
        p = p.masked_fill((scores == float("-inf")).all(dim=-1, keepdim=True), 0.0)
    return p


def _mask(
    q: Tensor,
    k: Tensor,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    segment_rule: str,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor | None:
    """The dense boolean mask; as small as it can be for lengths alone."""
    conditions = (q_lens, q_segments, mask)
    if not is_causal and all(condition is None for condition in conditions):
        if kv_lens is None:
            return None
        return (torch.arange(k.shape[2], device=q.device) < kv_lens[:, None])[:, None, None, :]
    return allowed_pairs(
        q, k, kv_lens=kv_lens, q_lens=q_lens, q_segments=q_segments, kv_segments=kv_segments,
        segment_rule=segment_rule, mask=mask, is_causal=is_causal,
    )  # fmt: skip
