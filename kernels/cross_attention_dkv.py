"""`cross_attention`, backward, the pass over keys: dk and dv."""

from __future__ import annotations

import triton
import triton.language as tl
from mmfast.kernels._attention import (
    add_product,
    dropout_keep,
    first_row,
    inner,
    length,
    load_bias,
    load_keys,
    load_queries,
    may_attend,
    only,
    row_offset,
    scaled,
    segment_span,
    store_rows,
    tile_rows,
    written_rows,
    zeros,
)
from mmfast.kernels._attention_call import INTEGERS, Given, Sizes
from mmfast.kernels._attention_gradients import load_statistics, pair_gradients

_GREATEST = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=[*INTEGERS, "tiles_m", "splits"])
def cross_attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    dimportance_ptr, dweights_ptr, kv_lens, q_lens, q_segments, kv_segments, mask, bias_ptr,
    q_starts, kv_starts, seed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dout_b, dout_h, dout_n,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, threshold, heads, G, N, M,
    scale, natural_scale, keep_scale, weight_factor, tiles_m, splits,
    FORM: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """A program: a tile of keys of (b, g), and a split of the tiles of rows that may see them.

    The score matrix is transposed here, `[keys, rows]`, so that its products need no transposing.
    VALUES: what came in is dout, otherwise gradients of importance and weights, and there is no dv.
    Rows of dk and dv are `splits` apart, one for each split.
    """
    sizes = Sizes(heads, G, N, M)
    given = Given(
        kv_lens, q_lens, q_segments, kv_segments, mask, bias_ptr, (mask_b, mask_h, mask_n),
        (bias_b, bias_h, bias_n), seed, threshold,
    )  # fmt: skip
    pid = tl.program_id(0)
    start = (pid % tiles_m) * FORM.block_m
    part = (pid // tiles_m) % splits
    g = (pid // tiles_m // splits) % G
    b = pid // tiles_m // splits // G
    kv_end = length(kv_lens, b, M)
    q_end = length(q_lens, b, N)
    shift = kv_end - q_end
    key = start + tl.arange(0, FORM.block_m)
    here = key < kv_end
    m = key[:, None]

    low = q_end * 0
    high = tl.where(start < kv_end, q_end, 0)
    if FORM.causal:
        low = tl.minimum(tl.maximum(start - shift, 0), high)
    if kv_segments is not None:
        segment = tl.load(kv_segments + b.to(tl.int64) * M + key, mask=here, other=0)
        smallest = tl.min(tl.where(here, segment, _GREATEST))
        greatest = tl.max(tl.where(here, segment, -_GREATEST - 1))
        if FORM.at_most:
            greatest = tl.maximum(greatest, _GREATEST)
        first, end = segment_span(q_segments + b.to(tl.int64) * N, high, smallest, greatest)
        low = tl.minimum(tl.maximum(low, first), end)
        high = end
    low = low // FORM.block_n * FORM.block_n
    tiles_n = tl.cdiv(high - low, FORM.block_n)
    tiles = heads * tiles_n
    if FORM.packed:
        low = low * 0
        tiles = tl.where(high > 0, tl.cdiv(heads * N, FORM.block_n), 0)
    chunk = tl.cdiv(tiles, splits)

    k_ptr += (b.to(tl.int64) * k_b + g.to(tl.int64) * k_h) * FORM.vec
    first_key, row_of_item = first_row(kv_starts, b), first_row(q_starts, b)
    k = load_keys(k_ptr, None, b, g, k_n, first_key + start, here, FORM.qk, FORM)
    dk = zeros(FORM.block_m, FORM.qk)
    if VALUES:
        v_ptr += (b.to(tl.int64) * v_b + g.to(tl.int64) * v_h) * FORM.vec
        v = load_keys(v_ptr, None, b, g, v_n, first_key + start, here, FORM.v, FORM)
        dv = zeros(FORM.block_m, FORM.v)
    for tile in tl.range(part * chunk, tl.minimum((part + 1) * chunk, tiles)):
        head, begin, n, inside = tile_rows(
            tile, tiles_n, low, N, heads, FORM.block_n, FORM.packed
        )  # fmt: skip
        live = inside & (n < q_end)
        if FORM.causal:
            live = live & (n + shift >= 0)
        h = g * heads + head
        q = load_queries(
            q_ptr, (q_b, q_h, q_n), b, h, row_of_item, begin, n, live, FORM.qk, FORM
        )  # fmt: skip
        lse, delta = load_statistics(lse_ptr, delta_ptr, b, h, n, live, sizes)
        if FORM.sparse:
            q = only(q, lse != float("inf"))  # a row that sees nothing may hold anything
        pair_h = h
        keep_h = h
        if FORM.packed:
            pair_h = h[None, :]
            keep_h = h[:, None]
        rows = live[None, :]
        if FORM.causal or FORM.sparse:
            own = n
            if q_segments is not None:
                own = tl.load(q_segments + b.to(tl.int64) * N + n, mask=live, other=0)
            allowed = may_attend(
                b, pair_h, n[None, :], m, rows, kv_end, shift, own[None, :], given, M, False, FORM
            )
        bias = load_bias(b, pair_h, n[None, :], m, rows, kv_end, given, False, FORM)
        p = tl.exp2(inner(k, q, FORM.precision) * scale + bias - lse[None, :])
        if FORM.causal or FORM.sparse:
            p = tl.where(allowed, p, 0.0)
        if VALUES:
            dout = load_queries(
                dout_ptr, (dout_b, dout_h, dout_n), b, h, row_of_item, begin, n, live, FORM.v,
                FORM,
            )  # fmt: skip
            if FORM.sparse:
                dout = only(dout, lse != float("inf"))
            dp = inner(v, dout, FORM.precision)
            dropped = p
            if FORM.dropout:
                keep = tl.trans(dropout_keep(b, keep_h, n, start, given, sizes, FORM))
                dp = tl.where(keep, dp * keep_scale, 0.0)
                dropped = tl.where(keep, p * keep_scale, 0.0)
            dv = add_product(dv, dropped.to(dout[0].dtype), dout, FORM.precision)
        else:
            dp = pair_gradients(
                dimportance_ptr, dweights_ptr, weight_factor, b, pair_h, n[None, :], m, rows,
                m < kv_end, sizes, FORM,
            )  # fmt: skip
        ds = p * (dp - delta[None, :])
        if FORM.causal or FORM.sparse:
            ds = tl.where(allowed, ds, 0.0)
        dk = add_product(dk, ds.to(k[0].dtype), q, FORM.precision)

    exists = written_rows(kv_starts, key < M, here)
    place = first_key + key
    at = row_offset((dk_b, dk_h, dk_n), b, g, place, FORM.vec) * splits + part * FORM.qk.size
    factor = tl.full([FORM.block_m], 1.0, tl.float32) * natural_scale
    store_rows(dk_ptr, at, exists, only(scaled(dk, factor), here), FORM.qk)
    if VALUES:
        at = row_offset((dv_b, dv_h, dv_n), b, g, place, FORM.vec) * splits + part * FORM.v.size
        store_rows(dv_ptr, at, exists, only(dv, here), FORM.v)
