"""`cross_attention`: queries of one stream attend to keys and values of another."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from mmfast import dispatch
from mmfast.ops import _arguments, _checks, _packed
from mmfast.ops._autograd import composed_derivatives, in_eager, is_plain
from mmfast.ops.cross_attention_autograd import fused, fused_probs
from mmfast.reference import CrossAttentionOutput

__all__ = ["CrossAttentionOutput", "cross_attention"]

_OP = "cross_attention"
_WEIGHTS = {False: 0, True: 1, "mean": 1, "per_head": 2}


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
    q_cu_seqlens: Tensor | None = None,
    kv_cu_seqlens: Tensor | None = None,
    max_q_len: int | None = None,
    max_kv_len: int | None = None,
    dropout_seed: Tensor | None = None,
) -> Any:
    """Attention over the keys that each row may see, without the score matrix in memory::

        S[b,h,n,m] = scale * <q[b,h,n], k[b,h//(H/G),m]> + bias[b,h,n,m]
        P          = softmax over the allowed m of row (b,h,n)
        out        = sigmoid(gate) * (dropout(P) @ v)

    A key is allowed when every condition that is given holds. A row that may see nothing gives
    exactly 0 (LSE -inf, zero gradients): length 0 is how a missing modality is expressed. Keys,
    values and rows that nobody may see can hold NaN or Inf: results and gradients are as if they
    were not there, and their own gradients are 0. A key that some rows of its item see and others
    do not is different: a non-finite value there may reach the other rows, as may one behind a
    bias of -inf.

    Args:
        q: `[B, H, N, D]` queries; float32, bfloat16, float16 or float64 (CPU). Any strides: with
            the last dim dense nothing is copied, so `[B, N, H, D]` memory transposed is taken as
            it is.
        k: `[B, G, M, D]` keys, `H % G == 0`; head h reads key head `h // (H / G)`. Dtype of q.
        v: `[B, G, M, Dv]` values. Dtype of q. None: the keys are the values as well, which the
            `cpu` backend reads once then, for head widths up to 8192 (projections absorbed into
            the queries, latent attention).
        kv_lens: `[B]` integers in `[0, M]`: key m is allowed where `m < kv_lens[b]`; no work is
            done for the others.
        q_lens: `[B]` integers in `[0, N]`: rows `n >= q_lens[b]` are not computed and are 0.
        q_segments, kv_segments: `[B, N]` and `[B, M]` integers (values of int32), both or neither.
        segment_rule: "equal" (`kv_segments == q_segments`: text sees only its own image) or
            "at_most" (`kv_segments <= q_segments`: all images so far).
        mask: bool, broadcasts to `[B, H, N, M]`; True = may attend, as in
            `F.scaled_dot_product_attention` (`nn.MultiheadAttention` has it the other way round).
        bias: added to the scores; broadcasts to `[B, H, N, M]` over any dim and has a gradient.
            Dtype of q, or float32. A row whose allowed keys all have bias -inf counts as seeing
            nothing.
        is_causal: `m <= n + kv_lens[b] - q_lens[b]`, aligned bottom-right on the true lengths
            (absent lengths count as M and N), as FlashAttention >= 2.1.
            `F.scaled_dot_product_attention` aligns top-left.
        scale: defaults to `D ** -0.5`.
        dropout_p: in `[0, 1)`: each weight is dropped with this probability, the others divided by
            `1 - dropout_p`. The seed is drawn from torch's default generator (`torch.manual_seed`
            and checkpointing reproduce it); the mask is a pure function of (seed, b, h, n, m).
        gate: `[B, N, H]` or `[B, N, H, Dv]` logits, dtype of q or float32; has a gradient.
        return_lse: also the natural log of the softmax's denominator, `[B, H, N]` float32
            (float64 for float64). Differentiable.
        return_importance: also the column sums of P over n, `[B, H, M]` float32 (float64 for
            float64): which keys mattered. Differentiable.
        return_weights: also P: True or "mean" for the head mean `[B, N, M]`, "per_head" for
            `[B, H, N, M]`; dtype of q. Differentiable. LSE, importance and weights are of P before
            dropout and gate.
        kv_cu_seqlens: `[B + 1]` integers, 0 and the cumulative lengths of the items: k is then
            packed, `[G, T, D]`, and v `[G, T, Dv]`: the keys of all items one after the other,
            without padding (usually a view of a projection `[T, G, D]`). Takes the place of
            `kv_lens`; `cu_seqlens_k` of FlashAttention's varlen functions, `offsets()` of a jagged
            `torch.nested` tensor.
        q_cu_seqlens: the same for the rows: q is `[H, Tq, D]`, gate `[Tq, H]` or `[Tq, H, Dv]`, and
            out `[H, Tq, Dv]`. Takes the place of `q_lens`. With either, everything else stays
            padded: N is the largest number of rows of an item, M that of keys, in `mask`, `bias`,
            segments, LSE, importance and weights. Dropout depends on positions within the item, so
            that the packed form drops what the padded one drops.
        dropout_seed: int64 `[1]`, takes the place of the seed drawn from torch's generator: calls
            with one seed drop the same weights.
        max_q_len, max_kv_len: these N and M; default: read from the values on the CPU, Tq and T
            elsewhere (no synchronisation, but more memory).

    Returns:
        `out` `[B, H, N, Dv]`, dtype of q, in memory as `[B, N, H, Dv]` when q is; or
        `CrossAttentionOutput(out, lse, importance, weights)`, None for what was not asked for, when
        any `return_*` is set.

    Raises:
        TypeError: something is not a tensor, or has the wrong dtype.
        ValueError: a shape, device, length or option is wrong. Every message names the op, the
            argument, what was expected, what came, and the remedy. The range of lengths is checked
            where that needs no device synchronisation (on the CPU); elsewhere they are clamped.
        RuntimeError: the backend asked for by name cannot take this call; or a gradient of a
            gradient is taken on a backend other than the reference.

    Under autocast q, k, v and gate are cast to the autocast dtype, and so is a bias that is not
    float32, as `F.scaled_dot_product_attention` does. Results are deterministic bit for bit.

    Source: Vaswani et al. 2017; tiling and LSE as FlashAttention (Dao et al. 2022, 2023); segments
    as Flamingo (Alayrac et al. 2022).
    """
    shared = v is None or v is k
    if shared:
        v = k
    assert v is not None
    eager = in_eager() and is_plain(q) and is_plain(k) and is_plain(v)
    on_cpu = eager and q.is_cpu and k.is_cpu and v.is_cpu
    if not eager:
        for name, value in (("q", q), ("k", k), ("v", v)):
            _checks.require_tensor(_OP, name, value)
    if torch.is_autocast_enabled("cpu" if on_cpu else _arguments.autocast_device(q)):
        q, k, v, bias, gate = _arguments.autocast(q, k, None if shared else v, bias, gate)

    # --- validation: types, shapes, devices ---
    q_packing = kv_packing = None
    if q_cu_seqlens is not None or kv_cu_seqlens is not None:
        if q_cu_seqlens is not None:
            _packed.require_packed("q", q, "[H, Tq, D]")
            q_packing = _packed.packing("q", q_cu_seqlens, max_q_len, q_lens, q.shape[1], q, eager)
            q_lens, q = q_packing.lens, q.unsqueeze(0)
            gate = None if gate is None else _packed.padded_gate(gate, q.shape[2])
        if kv_cu_seqlens is not None:
            _packed.require_packed("k", k, "[G, T, D]")
            _packed.require_packed("v", v, "[G, T, Dv]")
            kv_packing = _packed.packing(
                "kv", kv_cu_seqlens, max_kv_len, kv_lens, k.shape[1], q, eager
            )
            kv_lens, k = kv_packing.lens, k.unsqueeze(0)
            v = k if shared else v.unsqueeze(0)
    if (max_q_len is not None and q_packing is None) or (
        max_kv_len is not None and kv_packing is None
    ):
        raise ValueError(_packed.MAX_LEN_MESSAGE)
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(q_shape) != 4 or len(k_shape) != 4 or len(v_shape) != 4:
        raise ValueError(_arguments.rank_message(q, k, v))
    B, H, N, D = q_shape
    _, G, M, Dv = v_shape
    items = B
    if q_packing is not None or kv_packing is not None:
        items, B = _packed.batch_of(q_packing, kv_packing, q, k)
    if (
        k_shape[0] != items
        or v_shape[0] != items
        or k_shape[1] != G
        or k_shape[2] != M
        or k_shape[3] != D
        or H < 1
        or G < 1
        or D < 1
        or Dv < 1
        or H % G != 0
    ):
        raise ValueError(_arguments.shape_message(q, k, v))
    dtype = q.dtype
    if dtype not in _checks.FLOAT_DTYPES or k.dtype != dtype or v.dtype != dtype:
        raise TypeError(_arguments.dtype_message(q, k, v))
    if not on_cpu:
        for name, tensor in (("k", k), ("v", v)):
            _checks.require_device(_OP, name, tensor, q)
    if q_packing is not None:
        N = q_packing.longest
    if kv_packing is not None:
        M = kv_packing.longest
    for option in (kv_lens, q_lens, q_segments, kv_segments, mask, bias, gate):
        if option is not None and eager:
            eager = is_plain(option)

    if kv_lens is not None and kv_packing is None:
        kv_lens = _arguments.integers("kv_lens", kv_lens, (B,), 0, M, q, eager)
    if q_lens is not None and q_packing is None:
        q_lens = _arguments.integers("q_lens", q_lens, (B,), 0, N, q, eager)
    rule = 0
    if q_segments is not None or kv_segments is not None or segment_rule != "equal":
        rule = _arguments.check_rule(q_segments, kv_segments, segment_rule)
        if q_segments is not None and kv_segments is not None:
            low, high = _checks.INT32_MIN, _checks.INT32_MAX
            q_segments = _arguments.integers("q_segments", q_segments, (B, N), low, high, q, eager)
            kv_segments = _arguments.integers(
                "kv_segments", kv_segments, (B, M), low, high, q, eager
            )
    if mask is not None:
        mask = _arguments.prepare_mask(mask, q, (B, H, N, M))
    if bias is not None:
        bias = _arguments.prepare_bias(bias, q, (B, H, N, M))
    if gate is not None:
        rows = (B, N) if q_packing is None else (1, q_shape[2])
        gate = _arguments.prepare_gate(gate, q, (*rows, H), Dv)
    scale = D**-0.5 if scale is None else _arguments.check_scale(scale)
    if dropout_p != 0.0:
        _arguments.check_dropout(dropout_p)
    if return_weights is not False and return_weights not in _WEIGHTS:
        raise ValueError(
            f"{_OP}: return_weights is {return_weights!r}; "
            f"it must be False, True, 'mean' or 'per_head'"
        )

    # --- the backend ---
    derivatives = None
    if not eager or forward_ad._current_level >= 0:
        derivatives = composed_derivatives(eager, q, k, v, bias, gate)
    row = dispatch.select(_OP, q, v, derivatives, shared)
    seed = None
    if dropout_seed is not None:
        _arguments.check_seed(dropout_seed, q)
    if dropout_p != 0.0:
        seed = dropout_seed
        if seed is None:
            seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    if row.composed:
        return row.launcher(
            q if q_packing is None else q.squeeze(0), k if kv_packing is None else k.squeeze(0),
            v if kv_packing is None else v.squeeze(0),
            kv_lens=None if kv_packing is not None else kv_lens,
            q_lens=None if q_packing is not None else q_lens, q_segments=q_segments,
            kv_segments=kv_segments, segment_rule=segment_rule, mask=mask, bias=bias,
            is_causal=bool(is_causal), scale=scale, dropout_p=dropout_p,
            gate=gate if gate is None or q_packing is None else gate.squeeze(0),
            return_lse=return_lse, return_importance=return_importance,
            return_weights=return_weights, dropout_seed=seed,
            q_cu_seqlens=None if q_packing is None else q_packing.starts,
            kv_cu_seqlens=None if kv_packing is None else kv_packing.starts,
            max_q_len=None if q_packing is None else N,
            max_kv_len=None if kv_packing is None else M,
        )  # fmt: skip

    kernels = row.launcher()
    if q.stride(3) != 1 and D != 1:
        q = q.contiguous()
    if k.stride(3) != 1 and D != 1:
        k = k.contiguous()
    values: Tensor | None = k
    if not shared:
        values = v if v.stride(3) == 1 or Dv == 1 else v.contiguous()
    elif row.shares(q):
        values = None
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (gate is not None and gate.requires_grad)
    )
    is_causal = bool(is_causal)
    wants_more = bool(return_lse or return_importance or return_weights)
    q_starts = kv_starts = None
    max_q = max_kv = 0
    if q_packing is not None:
        q_starts, max_q = q_packing.starts, N
    if kv_packing is not None:
        kv_starts, max_kv = kv_packing.starts, M
    out, lse = fused(
        kernels, eager, needs_grad, wants_more,
        (q, k, values, kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts,
         gate, seed, scale, dropout_p, is_causal, rule, max_q, max_kv),
    )  # fmt: skip
    if q_packing is not None:
        out = out.squeeze(0)
    if not wants_more:
        return out
    importance = weights = None
    if return_importance or return_weights:
        importance, weights = fused_probs(
            kernels, eager, needs_grad,
            (q, k, lse, kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts,
             scale, is_causal, rule, max_q, max_kv, bool(return_importance),
             _WEIGHTS[return_weights]),
        )  # fmt: skip
    return CrossAttentionOutput(
        out,
        lse if return_lse else None,
        importance if return_importance else None,
        weights if return_weights else None,
    )
