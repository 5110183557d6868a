"""Importance of keys and attention weights, and their gradients.

importance[b,h,m] = sum of P over n; weights = P, or its mean over heads. Both are of P before
dropout and gate, recomputed from q, k and the LSE.
"""

from __future__ import annotations

import torch
from mmfast.kernels._attention_call import WIDEST, Call, common_vec
from mmfast.kernels.cross_attention_bwd import Gradients
from mmfast.kernels.cross_attention_pairs import WEIGHTS, sum_pairs
from mmfast.kernels.cross_attention_shared_bwd import shared_probs, shared_probs_gradients
from torch import Tensor


def cross_attention_probs(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    q_starts: Tensor | None,
    kv_starts: Tensor | None,
    scale: float,
    is_causal: bool,
    segment_rule: int,
    max_q: int,
    max_kv: int,
    importance: bool,
    weights: int,
) -> tuple[Tensor, Tensor]:
    """`(importance, weights)`; empty tensors for what is not asked for.

    weights: 0 none, 1 the mean over heads `[B, N, M]`, 2 `[B, H, N, M]`.
    """
    call = Call(
        q, k, None, kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts,
        None, None, scale, 0.0, is_causal, segment_rule, max_q, max_kv,
    )  # fmt: skip
    if call.D > WIDEST:
        return shared_probs(call, lse, importance, weights)
    form = call.form._replace(vec=common_vec(q, k))
    B, H, N, M = call.B, call.H, call.N, call.M
    sums = torch.empty(0, dtype=torch.float32, device=q.device)
    if importance:
        sums = sum_pairs(call, form, WEIGHTS, lse, (B, H, M), torch.float32)
    p = q.new_empty(0)
    if weights == 1:
        p = sum_pairs(call, form, WEIGHTS, lse, (B, 1, N, M), q.dtype, 1.0 / H)[:, 0]
    elif weights == 2:
        p = sum_pairs(call, form, WEIGHTS, lse, (B, H, N, M), q.dtype)
    return sums, p


def cross_attention_probs_bwd(
    dimportance: Tensor | None,
    dweights: Tensor | None,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    q_starts: Tensor | None,
    kv_starts: Tensor | None,
    scale: float,
    is_causal: bool,
    segment_rule: int,
    max_q: int,
    max_kv: int,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(dq, dk, dbias, dlse)`; dbias is empty where it is not needed.

    P = exp(S - LSE): dlse = -rowsum(P dP), and the LSE passes it on to the scores.
    """
    call = Call(
        q, k, None, kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts,
        None, None, scale, 0.0, is_causal, segment_rule, max_q, max_kv,
    )  # fmt: skip
    if call.D > WIDEST:
        needed = bias if need_dbias else None
        return shared_probs_gradients(call, lse, dimportance, dweights, needed)
    passes = Gradients(call, lse, None, None, dimportance, dweights)
    dk, _ = passes.keys()
    dq, dbias, sums = passes.queries_and_bias(bias if need_dbias else None, row_sums=True)
    assert sums is not None
    return dq, dk, dbias, -sums
