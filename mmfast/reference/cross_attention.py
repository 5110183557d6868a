"""The meaning of `cross_attention` in plain torch: every backend must agree with this file.

Everything is computed in float32 (float64 for float64 input) and rounded to the storage dtype once,
at the end. All of it is composed of differentiable torch functions, so first, second and
forward-mode derivatives are PyTorch's own.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.reference.philox import dropout_keep


class CrossAttentionOutput(NamedTuple):
    """What `cross_attention` returns when more than `out` is asked for; None where not asked."""

    out: Tensor
    lse: Tensor | None = None
    importance: Tensor | None = None
    weights: Tensor | None = None


def allowed_pairs(
    q: Tensor,
    k: Tensor,
    *,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    segment_rule: str = "equal",
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """bool `[B, H or 1, N, M]`: may row (b, h, n) attend to key m? The AND of what is given."""
    B, N, M = q.shape[0], q.shape[2], k.shape[2]
    n = torch.arange(N, device=q.device)[:, None]
    m = torch.arange(M, device=q.device)[None, :]
    kv_end = M if kv_lens is None else kv_lens.long()[:, None, None, None]
    q_end = N if q_lens is None else q_lens.long()[:, None, None, None]

    allowed = ((m < kv_end) & (n < q_end)).expand(B, 1, N, M)
    if is_causal:
        allowed = allowed & (m <= n + kv_end - q_end)
    if q_segments is not None and kv_segments is not None:
        own, other = q_segments[:, None, :, None], kv_segments[:, None, None, :]
        allowed = allowed & (own == other if segment_rule == "equal" else other <= own)
    if mask is not None:
        allowed = allowed & mask
    return allowed


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
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
    dropout_seed: Tensor | int | None = None,
    q_cu_seqlens: Tensor | None = None,
    kv_cu_seqlens: Tensor | None = None,
    max_q_len: int | None = None,
    max_kv_len: int | None = None,
) -> Tensor | CrossAttentionOutput:
    """`sigmoid(gate) * (dropout(softmax(scale * q k^T + bias)) @ v)` over the allowed keys.

    The arguments are those of `mmfast.cross_attention`, which documents and checks them; here they
    are taken on trust. Packed rows are padded first, and the result is packed again. `dropout_seed`
    (an int, or an int64 tensor of one element) fixes the dropout
    mask; without it one is drawn from torch's default generator.
    """
    v = k if v is None else v
    q_at = kv_at = None
    if kv_cu_seqlens is not None:
        kv_at, kv_lens = padded_positions(kv_cu_seqlens, max_kv_len)
        k, v = pad_rows(k, kv_at), pad_rows(v, kv_at)
    if q_cu_seqlens is not None:
        rows = q.shape[1]
        q_at, q_lens = padded_positions(q_cu_seqlens, max_q_len)
        rows_first = q.stride(0) < q.stride(1)
        q = pad_rows(q, q_at)
        if rows_first:
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
        if gate is not None:
            width = (1,) * (3 - gate.dim())
            gate = pad_rows(gate.view(*gate.shape, *width).transpose(0, 1), q_at).transpose(1, 2)
            gate = gate.squeeze(-1) if width else gate
    # Under autocast the caller has chosen the storage dtype; the sums stay in full precision.
    device_type = q.device.type
    autocasting = device_type != "meta" and torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if autocasting else nullcontext():
        result = _cross_attention(
            q, k, v, kv_lens, q_lens, q_segments, kv_segments, segment_rule, mask, bias, is_causal,
            scale, dropout_p, gate, return_lse, return_importance, return_weights, dropout_seed,
        )  # fmt: skip
    if q_at is None:
        return result
    if isinstance(result, Tensor):
        return unpad_rows(result, q_at, rows)
    return result._replace(out=unpad_rows(result.out, q_at, rows))


def padded_positions(cu_seqlens: Tensor, longest: int | None) -> tuple[Tensor, Tensor]:
    """`(at, lens)`: at `[B, longest]` is the packed row at each padded place, -1 where none is."""
    starts = cu_seqlens.long()
    lens = (starts[1:] - starts[:-1]).clamp(min=0)
    if longest is None:
        longest = int(lens.max()) if lens.numel() else 0
    n = torch.arange(longest, device=starts.device)
    return torch.where(n < lens[:, None], starts[:-1, None] + n, -1), lens


def pad_rows(packed: Tensor, at: Tensor) -> Tensor:
    """`[H, T, D]` -> `[B, H, L, D]` with zeros where there is no row."""
    if packed.shape[1] == 0:
        shape = (packed.shape[0], *at.shape, packed.shape[2])
        return packed.new_zeros(shape).transpose(0, 1) + packed.sum()
    rows = packed[:, at.clamp(min=0)].transpose(0, 1)
    return rows.masked_fill((at < 0)[:, None, :, None], 0.0)


def unpad_rows(padded: Tensor, at: Tensor, rows: int) -> Tensor:
    """`[B, H, L, D]` -> `[H, rows, D]` with zeros in rows of no item.

    In memory it is `[rows, H, D]` where `padded` has its rows before its heads.
    """
    H, D = padded.shape[1], padded.shape[3]
    source = padded.transpose(1, 2).reshape(-1, H, D)
    held = (at >= 0).reshape(-1)
    # What is no row goes to a spare one at the end: no shape depends on values, as tracing asks.
    to = torch.where(held, at.reshape(-1), rows)
    packed = source.new_zeros(rows + 1, H, D).index_copy(0, to, source)[:rows].transpose(0, 1)
    return packed if padded.stride(1) < padded.stride(2) else packed.contiguous()


def _cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    segment_rule: str,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    gate: Tensor | None,
    return_lse: bool,
    return_importance: bool,
    return_weights: bool | str,
    dropout_seed: Tensor | int | None,
) -> Tensor | CrossAttentionOutput:
    storage = q.dtype
    compute = torch.float64 if storage == torch.float64 else torch.float32
    B, H, N, D = q.shape
    G, M = k.shape[1], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    allowed = allowed_pairs(
        q, k, kv_lens=kv_lens, q_lens=q_lens, q_segments=q_segments, kv_segments=kv_segments,
        segment_rule=segment_rule, mask=mask, is_causal=is_causal,
    )  # fmt: skip

    # Nothing masked leaks: a row that sees no key and a key that no row sees are replaced by zeros
    # before any arithmetic, so that a NaN there reaches neither result nor gradient.
    row_sees = allowed.any(dim=-1)
    key_seen = allowed.any(dim=-2).expand(B, H, M).reshape(B, G, H // G, M).any(dim=2)
    qc = q.to(compute).masked_fill(~row_sees[..., None], 0.0)
    kc = k.to(compute).masked_fill(~key_seen[..., None], 0.0).repeat_interleave(H // G, dim=1)
    vc = v.to(compute).masked_fill(~key_seen[..., None], 0.0).repeat_interleave(H // G, dim=1)

    scores = scale * (qc @ kc.transpose(-2, -1))
    if bias is not None:
        scores = scores + bias.to(compute)
    scores = scores.masked_fill(~allowed, float("-inf"))

    # A row is dead when it may see nothing, or only keys whose bias is -inf.
    dead_top = scores.new_full((B, H, N), float("-inf"))
    top = scores.detach().amax(dim=-1) if M else dead_top
    dead = top == float("-inf")
    top = top.masked_fill(dead, 0.0)
    exponentials = (scores - top[..., None]).exp()
    total = exponentials.sum(dim=-1).masked_fill(dead, 1.0)
    p = exponentials / total[..., None]
    lse = (top + total.log()).masked_fill(dead, float("-inf"))

    dropped = p
    if dropout_p > 0.0:
        keep = dropout_keep(_seed_tensor(dropout_seed, q), dropout_p, B, H, N, M)
        dropped = p.masked_fill(~keep, 0.0) / (1.0 - dropout_p)
    out = dropped @ vc
    if gate is not None:
        logits = gate.to(compute).transpose(1, 2)  # [B, H, N] or [B, H, N, Dv] after the next line
        logits = logits[..., None] if gate.dim() == 3 else logits
        out = out * torch.sigmoid(logits.masked_fill(dead[..., None], 0.0))
    out = out.masked_fill(dead[..., None], 0.0).to(storage)
    if q.stride(1) < q.stride(2):  # the memory of `out` follows that of q
        out = out.transpose(1, 2).contiguous().transpose(1, 2)

    if not (return_lse or return_importance or return_weights):
        return out
    weights = None
    if return_weights:
        weights = (p if return_weights == "per_head" else p.mean(dim=1)).to(storage)
    return CrossAttentionOutput(
        out,
        lse if return_lse else None,
        p.sum(dim=2) if return_importance else None,
        weights,
    )


def _seed_tensor(seed: Tensor | int | None, like: Tensor) -> Tensor:
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), device=like.device)
    if isinstance(seed, int):
        return torch.tensor([seed], device=like.device)
    return seed
