"""`cross_attention` whose values are its keys, for wide rows: backward, importance and weights.

1. Pairs: a program takes a tile of rows and a tile of keys, goes over the channels for the scores
   and for dP = dout c^T at once, and writes dS = P (dP - delta) and the dropped P in storage type.
2. dq = scale dS c: the products of the forward.
3. dc = scale dS^T q + P^T dout: a program takes a tile of keys and a block of channels and goes
   over the rows of all heads that share the context.

Sums over rows or heads (importance, weights, the gradient of a bias) are taken of a workspace of
pairs in float32: rows are few here.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from mmfast.kernels._attention import (
    dropout_keep,
    first_row,
    key_range,
    length,
    load_bias,
    may_attend,
    row_offset,
    tile_rows,
    written_rows,
)
from mmfast.kernels._attention_call import (
    INTEGERS,
    Call,
    Given,
    Sizes,
    empty_following,
    strides_of,
)
from mmfast.kernels._attention_gradients import load_statistics, pair_gradients
from mmfast.kernels._attention_wide import Blocks, load_columns, pair_offset, store_columns
from mmfast.kernels._launch import launch
from mmfast.kernels._packed import clear_outside
from mmfast.kernels.cross_attention_shared import products
from torch import Tensor

ROWS_AT_ONCE = {2: 32, 4: 16}

WEIGHTS, FROM_OUTPUT, FROM_PAIRS = 0, 1, 2
"""What of pairs is wanted: P; dS of what came in for the output; dS of what came in for P."""


@triton.jit(do_not_specialize=[*INTEGERS, "tiles_n", "tiles", "tiles_m", "pitch"])
def cross_attention_shared_pairs_kernel(
    q_ptr, k_ptr, dout_ptr, lse_ptr, delta_ptr, p_ptr, ds_ptr, dbias_ptr,
    dimportance_ptr, dweights_ptr,
    kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts, seed,
    q_b, q_h, q_n, k_b, k_h, k_n, dout_b, dout_h, dout_n,
    mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, threshold, heads, G, N, M,
    scale, keep_scale, weight_factor, tiles_n, tiles, tiles_m, pitch,
    FORM: tl.constexpr, COLUMNS: tl.constexpr, WHAT: tl.constexpr,
):  # fmt: skip
    """A program: a tile of rows of (b, g) and a tile of keys; every tile is written.

    p (dropped, unless P is what is wanted) and ds are workspaces; dbias `[B, H, N, M]` or None.
    """
    sizes = Sizes(heads, G, N, M)
    given = Given(
        kv_lens, q_lens, q_segments, kv_segments, mask, bias, (mask_b, mask_h, mask_n),
        (bias_b, bias_h, bias_n), seed, threshold,
    )  # fmt: skip
    pid = tl.program_id(0)
    start = (pid // tiles) % tiles_m * FORM.block_m
    g = (pid // tiles // tiles_m) % G
    b = pid // tiles // tiles_m // G
    head, _, n, inside = tile_rows(
        pid % tiles, tiles_n, 0, N, heads, FORM.block_n, FORM.packed
    )  # fmt: skip
    kv_end = length(kv_lens, b, M)
    q_end = length(q_lens, b, N)
    shift = kv_end - q_end
    live = inside & (n < q_end)
    own = n
    if q_segments is not None:
        own = tl.load(q_segments + b.to(tl.int64) * N + n, mask=live, other=0)
    low, _, high = key_range(b, n, live, shift, kv_end, own, given, M, FORM)
    h = g * heads + head
    pair_h = h
    if FORM.packed:
        pair_h = h[:, None]
    key = start + tl.arange(0, FORM.block_m)
    rows, m = n[:, None], key[None, :]
    p = tl.zeros([FORM.block_n, FORM.block_m], tl.float32)
    ds = p
    if (start >= low) & (start < high):
        here = key < kv_end
        lse, delta = load_statistics(lse_ptr, delta_ptr, b, h, n, live, sizes)
        sees = live & (lse != float("inf"))
        place = first_row(q_starts, b) + n
        q_at = row_offset((q_b, q_h, q_n), b, h, place, FORM.vec)
        k_at = row_offset((k_b, k_h, k_n), b, g, first_row(kv_starts, b) + key, FORM.vec)
        scores = tl.zeros([FORM.block_n, FORM.block_m], tl.float32)
        dp = scores
        if WHAT == 1:
            dout_at = row_offset((dout_b, dout_h, dout_n), b, h, place, FORM.vec)
        for c in tl.range(0, FORM.qk.size, COLUMNS):
            q = load_columns(q_ptr, q_at, live, c, FORM.qk.size, COLUMNS)
            k = load_columns(k_ptr, k_at, here, c, FORM.qk.size, COLUMNS)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=FORM.precision)
            if WHAT == 1:
                dout = load_columns(dout_ptr, dout_at, live, c, FORM.qk.size, COLUMNS)
                dp = tl.dot(dout, tl.trans(k), dp, input_precision=FORM.precision)
        allowed = may_attend(
            b, pair_h, rows, m, sees[:, None], kv_end, shift, own[:, None], given, M, False, FORM
        )  # fmt: skip
        added = load_bias(b, pair_h, rows, m, live[:, None], kv_end, given, False, FORM)
        p = tl.where(allowed, tl.exp2(scores * scale + added - lse[:, None]), 0.0)
        if WHAT == 2:
            dp = pair_gradients(
                dimportance_ptr, dweights_ptr, weight_factor, b, pair_h, rows, m, live[:, None],
                m < kv_end, sizes, FORM,
            )  # fmt: skip
        dropped = p
        if FORM.dropout:
            keep = dropout_keep(b, pair_h, n, start, given, sizes, FORM)
            dp = tl.where(keep, dp * keep_scale, 0.0)
            dropped = tl.where(keep, p * keep_scale, 0.0)
        ds = tl.where(allowed, p * (dp - delta[:, None]), 0.0)
        p = dropped
    row = ((b * G + g) * sizes.heads + head).to(tl.int64) * N + n
    at = pair_offset(row, key, pitch)
    if p_ptr is not None:
        tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=inside[:, None])
    if ds_ptr is not None:
        tl.store(ds_ptr + at, ds.to(ds_ptr.dtype.element_ty), mask=inside[:, None])
    if dbias_ptr is not None:
        tl.store(
            dbias_ptr + row[:, None] * M + m, ds.to(dbias_ptr.dtype.element_ty),
            mask=inside[:, None] & (m < M),
        )  # fmt: skip


@triton.jit(do_not_specialize=[*INTEGERS, "tiles_c", "tiles_m", "pitch"])
def cross_attention_shared_keys_kernel(
    ds_ptr, p_ptr, q_ptr, dout_ptr, lse_ptr, dk_ptr, kv_lens, q_lens, q_starts, kv_starts,
    q_b, q_h, q_n, dout_b, dout_h, dout_n, dk_b, dk_h, dk_n, heads, G, N, M,
    natural_scale, tiles_c, tiles_m, pitch,
    FORM: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """A program: a tile of keys of (b, g), a block of channels. VALUES: the keys are values too."""
    pid = tl.program_id(0)
    c = pid % tiles_c * COLUMNS
    start = (pid // tiles_c) % tiles_m * FORM.block_m
    g = (pid // tiles_c // tiles_m) % G
    b = pid // tiles_c // tiles_m // G
    kv_end = length(kv_lens, b, M)
    q_end = length(q_lens, b, N)
    key = start + tl.arange(0, FORM.block_m)
    here = key < kv_end
    item = first_row(q_starts, b)
    count = tl.where(start < kv_end, heads * N, 0)
    by_scores = tl.zeros([FORM.block_m, COLUMNS], tl.float32)
    by_values = by_scores
    for first in tl.range(0, count, FORM.block_n):
        r = first + tl.arange(0, FORM.block_n)
        n = r % N
        h = g * heads + r // N
        live = (r < heads * N) & (n < q_end)
        row = (b * G + g).to(tl.int64) * heads * N + r
        at = pair_offset(row, key, pitch)
        q_at = row_offset((q_b, q_h, q_n), b, h, item + n, FORM.vec)
        q = load_columns(q_ptr, q_at, live, c, FORM.qk.size, COLUMNS)
        if FORM.sparse or FORM.causal:  # a row that sees nothing may hold anything
            sees = tl.load(lse_ptr + row, mask=live, other=float("-inf")) != float("-inf")
            q = tl.where(sees[:, None], q, 0.0)
        ds = tl.load(ds_ptr + at, mask=live[:, None], other=0.0)
        by_scores = tl.dot(tl.trans(ds), q, by_scores, input_precision=FORM.precision)
        if VALUES:
            at_dout = row_offset((dout_b, dout_h, dout_n), b, h, item + n, FORM.vec)
            dout = load_columns(dout_ptr, at_dout, live, c, FORM.qk.size, COLUMNS)
            if FORM.sparse or FORM.causal:
                dout = tl.where(sees[:, None], dout, 0.0)
            p = tl.load(p_ptr + at, mask=live[:, None], other=0.0)
            by_values = tl.dot(tl.trans(p), dout, by_values, input_precision=FORM.precision)
    dk = tl.where(here[:, None], by_scores * natural_scale + by_values, 0.0)
    at = row_offset((dk_b, dk_h, dk_n), b, g, first_row(kv_starts, b) + key, FORM.vec)
    exists = written_rows(kv_starts, key < M, here)
    store_columns(dk_ptr, at, exists, c, dk, FORM.qk.size, COLUMNS)


def _pairs(
    blocks: Blocks,
    what: int,
    lse: Tensor,
    p: Tensor | None,
    ds: Tensor | None,
    dbias: Tensor | None,
    dout: Tensor | None = None,
    delta: Tensor | None = None,
    dimportance: Tensor | None = None,
    dweights: Tensor | None = None,
) -> None:
    call = blocks.call
    weights, factor = 0, 1.0
    if dweights is not None:
        weights = 1 if dweights.dim() == 3 else 2
        factor = 1.0 / call.H if weights == 1 else 1.0
    form = blocks.form._replace(weights=weights)
    launch(
        cross_attention_shared_pairs_kernel, blocks.groups * blocks.tiles * blocks.tiles_m, call.q,
        call.k, dout, lse, delta, p, ds, dbias, dimportance, dweights, *call.given,
        *strides_of(call.q, form.vec), *strides_of(call.k, form.vec),
        *((0, 0, 0) if dout is None else strides_of(dout, form.vec)), *call.sizes,
        call.signed_scale, call.keep_scale, factor, blocks.tiles_n, blocks.tiles, blocks.tiles_m,
        blocks.pitch, FORM=form, WHAT=what, **blocks.constants(),
    )  # fmt: skip


def _keys(
    blocks: Blocks, lse: Tensor, p: Tensor | None, ds: Tensor, dout: Tensor | None, dk: Tensor
) -> None:
    call = blocks.call
    # Rows are what this kernel goes over: fewer at a time, where float32 is held in parts.
    rows = min(blocks.form.block_n, ROWS_AT_ONCE[call.q.element_size()])
    form = blocks.form._replace(block_n=rows)
    kv_lens, q_lens = call.given[:2]
    launch(
        cross_attention_shared_keys_kernel, blocks.groups * blocks.tiles_m * blocks.tiles_c, ds, p,
        call.q, dout, lse, dk, kv_lens, q_lens, call.q_starts, call.kv_starts,
        *strides_of(call.q, form.vec),
        *((0, 0, 0) if dout is None else strides_of(dout, form.vec)), *strides_of(dk, form.vec),
        *call.sizes[7:], call.natural_scale, blocks.tiles_c, blocks.tiles_m, blocks.pitch,
        FORM=form, VALUES=dout is not None, **blocks.constants(),
    )  # fmt: skip
    clear_outside(dk, call.kv_starts, kv_lens, call.M)


def _gradients(
    call: Call,
    what: int,
    lse: Tensor,
    bias: Tensor | None,
    need_dk: bool,
    **incoming: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dbias or an empty tensor, with FROM_PAIRS the sums of dS over the keys)."""
    dq = empty_following(call.q, call.D)
    dk = empty_following(call.k, call.D) if need_dk else call.k.new_empty(0)
    dout = incoming.get("dout")
    blocks = Blocks(call, dq, *([dk] if need_dk else []), *([] if dout is None else [dout]))
    dtype = call.q.dtype
    p = blocks.workspace(dtype) if what == FROM_OUTPUT and need_dk else None
    ds = blocks.workspace(dtype)
    whole, dbias, made = (call.B, call.H, call.N, call.M), call.q.new_empty(0), None
    if bias is not None or what == FROM_PAIRS:
        own = what == FROM_OUTPUT and bias is not None and tuple(bias.shape) == whole
        kept = bias.dtype if own and bias is not None else torch.float32
        made = torch.empty(whole, dtype=kept, device=call.q.device)
    _pairs(blocks, what, lse, p, ds, made, **incoming)
    if bias is not None and made is not None:
        dbias = made.sum_to_size(bias.shape).to(bias.dtype)
    products(blocks, ds, dq, call.natural_scale)
    if need_dk:
        _keys(blocks, lse, p, ds, dout, dk)
    sums = made.sum(3) if what == FROM_PAIRS and made is not None else lse
    return dq, dk, dbias, sums


def shared_gradients(
    call: Call, lse: Tensor, dout: Tensor, delta: Tensor, bias: Tensor | None, need_dk: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dbias)` of the output; bias: None where its gradient is not needed.

    dk is empty where it is not needed.
    """
    incoming: dict[str, Any] = {"dout": dout, "delta": delta}
    return _gradients(call, FROM_OUTPUT, lse, bias, need_dk, **incoming)[:3]


def shared_probs(call: Call, lse: Tensor, importance: bool, weights: int) -> tuple[Tensor, Tensor]:
    """`(importance, weights)` of `cross_attention_probs`, through P `[B, H, N, M]` in float32."""
    blocks = Blocks(call)
    made = blocks.workspace(torch.float32)
    _pairs(blocks, WEIGHTS, lse, made, None, None)
    made = made[..., : call.M]
    p = call.q.new_empty(0)
    if weights:
        p = (made.mean(1) if weights == 1 else made).to(call.q.dtype).contiguous()
    return made.sum(2) if importance else lse.new_empty(0), p


def shared_probs_gradients(
    call: Call,
    lse: Tensor,
    dimportance: Tensor | None,
    dweights: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(dq, dk, dbias, dlse)` of `cross_attention_probs_bwd`."""
    incoming: dict[str, Any] = {"dimportance": dimportance, "dweights": dweights}
    dq, dk, dbias, sums = _gradients(call, FROM_PAIRS, lse, bias, True, **incoming)
    return dq, dk, dbias, -sums
