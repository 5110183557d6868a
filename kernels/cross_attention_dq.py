"""`cross_attention`, backward, the pass over queries: dq, and parts of the bias's gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from mmfast.kernels._attention import (
    add_product,
    dropout_keep,
    first_row,
    inner,
    key_range,
    length,
    load_bias,
    load_keys,
    load_queries,
    may_attend,
    only,
    row_offset,
    scaled,
    store_rows,
    tile_rows,
    written_rows,
    zeros,
)
from mmfast.kernels._attention_call import INTEGERS, Given, Sizes
from mmfast.kernels._attention_gradients import load_statistics, pair_gradients


@triton.jit
def _visit(
    state, q, dout, lse, delta, start, end, b, g, h, n, live, shift, own, place, k_ptr, v_ptr,
    k_described, v_described, k_n, v_n,
    scale, keep_scale, dimportance_ptr, dweights_ptr, weight_factor, dbias_ptr, given, sizes,
    WHOLE: tl.constexpr, VALUES: tl.constexpr, ROW_SUMS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """(dq, row sums of dS) after one more tile of keys. WHOLE: as in the forward."""
    MASKED: tl.constexpr = FORM.sparse or not WHOLE
    dq, sums = state
    key = start + tl.arange(0, FORM.block_m)
    rows, m = n[:, None], key[None, :]
    inside = None
    if not WHOLE:
        inside = key < end
    if MASKED:
        allowed = may_attend(
            b, h, rows, m, live[:, None], end, shift, own, given, sizes.M, WHOLE, FORM
        )  # fmt: skip
    bias = load_bias(b, h, rows, m, live[:, None], end, given, WHOLE, FORM)
    item, first = place
    k = load_keys(k_ptr, k_described, item, g, k_n, first + start, inside, FORM.qk, FORM)
    p = tl.exp2(inner(q, k, FORM.precision) * scale + bias - lse[:, None])
    if VALUES:
        v = load_keys(v_ptr, v_described, item, g, v_n, first + start, inside, FORM.v, FORM)
        dp = inner(dout, v, FORM.precision)
        if FORM.dropout:
            keep = dropout_keep(b, h, n, start, given, sizes, FORM)
            dp = tl.where(keep, dp * keep_scale, 0.0)
    else:
        dp = pair_gradients(
            dimportance_ptr, dweights_ptr, weight_factor, b, h, rows, m, live[:, None], m < end,
            sizes, FORM,
        )  # fmt: skip
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(allowed, ds, 0.0)
    if FORM.sparse:
        k = only(k, tl.max(allowed.to(tl.int32), 0) > 0)
    if dbias_ptr is not None:
        position = (b.to(tl.int64) * sizes.G * sizes.heads + h) * sizes.N + rows
        tl.store(
            dbias_ptr + position * sizes.M + m, ds.to(dbias_ptr.dtype.element_ty),
            mask=live[:, None] & (m < end),
        )  # fmt: skip
    if ROW_SUMS:
        sums += tl.sum(ds, 1)
    return add_product(dq, ds.to(k[0].dtype), k, FORM.precision), sums


@triton.jit(do_not_specialize=[*INTEGERS, "tiles_n", "tiles", "splits", "chunk"])
def cross_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, k_described, v_described, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    dbias_ptr, sums_ptr, dimportance_ptr, dweights_ptr,
    kv_lens, q_lens, q_segments, kv_segments, mask, bias_ptr, q_starts, kv_starts, seed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dout_b, dout_h, dout_n, dq_b, dq_h, dq_n,
    mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, threshold, heads, G, N, M,
    scale, natural_scale, keep_scale, weight_factor, tiles_n, tiles, splits, chunk,
    FORM: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """A program: a tile of rows of (b, g), and a split of the keys.

    dbias is `[B, H, N, M]`, zeros before, or None; sums `[splits, B*H*N]`, of dS over the keys of a
    row, or None. Rows of dq are `splits` apart, one for each split. VALUES: as for dk and dv.
    """
    sizes = Sizes(heads, G, N, M)
    given = Given(
        kv_lens, q_lens, q_segments, kv_segments, mask, bias_ptr, (mask_b, mask_h, mask_n),
        (bias_b, bias_h, bias_n), seed, threshold,
    )  # fmt: skip
    pid = tl.program_id(0)
    tile = pid % tiles
    part = (pid // tiles) % splits
    g = (pid // tiles // splits) % G
    b = pid // tiles // splits // G
    if FORM.causal:
        tile = tiles - 1 - tile  # those with the most keys begin first
    head, begin, n, inside = tile_rows(tile, tiles_n, 0, N, heads, FORM.block_n, FORM.packed)
    kv_end = length(kv_lens, b, M)
    q_end = length(q_lens, b, N)
    shift = kv_end - q_end
    live = inside & (n < q_end)
    own = n
    if q_segments is not None:
        own = tl.load(q_segments + b.to(tl.int64) * N + n, mask=live, other=0)
    low, full, high = key_range(b, n, live, shift, kv_end, own, given, M, FORM)
    own = own[:, None]
    low = tl.maximum(low, part * chunk)
    high = tl.minimum(high, (part + 1) * chunk)
    full = tl.maximum(tl.minimum(full, high // FORM.block_m * FORM.block_m), low)

    h = g * heads + head
    pair_h = h
    if FORM.packed:
        pair_h = h[:, None]
    row_of_item = first_row(q_starts, b)
    place = (b, first_row(kv_starts, b))
    if kv_starts is not None:
        place = (b * 0, place[1])
    q = load_queries(q_ptr, (q_b, q_h, q_n), b, h, row_of_item, begin, n, live, FORM.qk, FORM)
    lse, delta = load_statistics(lse_ptr, delta_ptr, b, h, n, live, sizes)
    k_ptr += (b.to(tl.int64) * k_b + g.to(tl.int64) * k_h) * FORM.vec
    dout = q
    if VALUES:
        v_ptr += (b.to(tl.int64) * v_b + g.to(tl.int64) * v_h) * FORM.vec
        dout = load_queries(
            dout_ptr, (dout_b, dout_h, dout_n), b, h, row_of_item, begin, n, live, FORM.v, FORM
        )  # fmt: skip
    dq = zeros(FORM.block_n, FORM.qk)
    sums = tl.zeros([FORM.block_n], tl.float32)
    for start in tl.range(low, full, FORM.block_m):
        dq, sums = _visit(
            (dq, sums), q, dout, lse, delta, start, high, b, g, pair_h, n, live, shift, own,
            place, k_ptr, v_ptr, k_described, v_described, k_n, v_n, scale, keep_scale,
            dimportance_ptr, dweights_ptr, weight_factor, dbias_ptr, given, sizes, True, VALUES,
            sums_ptr is not None, FORM,
        )  # fmt: skip
    for start in tl.range(full, high, FORM.block_m):
        dq, sums = _visit(
            (dq, sums), q, dout, lse, delta, start, high, b, g, pair_h, n, live, shift, own,
            place, k_ptr, v_ptr, k_described, v_described, k_n, v_n, scale, keep_scale,
            dimportance_ptr, dweights_ptr, weight_factor, dbias_ptr, given, sizes, False, VALUES,
            sums_ptr is not None, FORM,
        )  # fmt: skip

    at = (
        row_offset((dq_b, dq_h, dq_n), b, h, row_of_item + n, FORM.vec) * splits
        + part * FORM.qk.size
    )
    factor = tl.full([FORM.block_n], 1.0, tl.float32) * natural_scale
    store_rows(dq_ptr, at, written_rows(q_starts, inside, live), scaled(dq, factor), FORM.qk)
    if sums_ptr is not None:
        rows = tl.num_programs(0).to(tl.int64) // tiles // splits * heads * N
        row = (b.to(tl.int64) * G * heads + h) * N + n
        tl.store(sums_ptr + part * rows + row, sums, mask=inside)
