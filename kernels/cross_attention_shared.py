"""`cross_attention` whose values are its keys, for wide rows: projections absorbed into queries.

out = sigmoid(gate) * (dropout(softmax(scale q c^T + bias)) @ c): few queries of many channels, and
one context c that all heads of a group read. A program cannot hold rows of output as wide as those,
and the scores need all channels before there is a weight. So two launches share the scores in a
workspace, which is small because the rows are few:

1. Scores: a program takes a tile of rows, of all heads that share the context, and a tile of keys,
   and goes over the channels. It writes scores, and the maximum and the sum of each of its rows.
2. Products: a program takes a tile of rows and a block of channels, knows each row's LSE from those
   maxima and sums, and goes over the keys: a plain product, without rescaling. Where blocks are too
   few to fill a device the keys are cut into splits, partial sums in float32, added in order.

The context comes from memory once, and from L2 the second time if it fits there. What that costs
against the alternatives is in docs/triton-attention.md.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from mmfast.kernels import _tuning
from mmfast.kernels._attention import (
    LN2,
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
    gate_strides,
    strides_of,
)
from mmfast.kernels._attention_wide import Blocks, load_columns, pair_offset, store_columns
from mmfast.kernels._blocks import column_sums, sigmoid
from mmfast.kernels._launch import launch
from mmfast.kernels._packed import clear_outside
from torch import Tensor


@triton.jit(do_not_specialize=[*INTEGERS, "tiles_n", "tiles", "tiles_m", "pitch"])
def cross_attention_shared_scores_kernel(
    q_ptr, k_ptr, scores_ptr, tops_ptr, totals_ptr,
    kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts, seed,
    q_b, q_h, q_n, k_b, k_h, k_n, mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, threshold,
    heads, G, N, M, scale, tiles_n, tiles, tiles_m, pitch,
    FORM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program: a tile of rows of (b, g) and a tile of keys. Scores are in units of log 2.

    tops and totals are `[B*H*N, tiles_m]`. Tiles that the rows' ranges leave out are not written.
    """
    sizes = Sizes(heads, G, N, M)
    given = Given(
        kv_lens, q_lens, q_segments, kv_segments, mask, bias, (mask_b, mask_h, mask_n),
        (bias_b, bias_h, bias_n), seed, threshold,
    )  # fmt: skip
    pid = tl.program_id(0)
    tile_m = (pid // tiles) % tiles_m
    start = tile_m * FORM.block_m
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
    if (start >= low) & (start < high):
        h = g * heads + head
        pair_h = h
        if FORM.packed:
            pair_h = h[:, None]
        key = start + tl.arange(0, FORM.block_m)
        here = key < kv_end
        q_at = row_offset((q_b, q_h, q_n), b, h, first_row(q_starts, b) + n, FORM.vec)
        k_at = row_offset((k_b, k_h, k_n), b, g, first_row(kv_starts, b) + key, FORM.vec)
        scores = tl.zeros([FORM.block_n, FORM.block_m], tl.float32)
        for c in tl.range(0, FORM.qk.size, COLUMNS):
            q = load_columns(q_ptr, q_at, live, c, FORM.qk.size, COLUMNS)
            k = load_columns(k_ptr, k_at, here, c, FORM.qk.size, COLUMNS)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=FORM.precision)
        rows, m = n[:, None], key[None, :]
        allowed = may_attend(
            b, pair_h, rows, m, live[:, None], kv_end, shift, own[:, None], given, M, False, FORM
        )  # fmt: skip
        added = load_bias(b, pair_h, rows, m, live[:, None], kv_end, given, False, FORM)
        scores = tl.where(allowed, scores * scale + added, float("-inf"))
        top = tl.max(scores, 1)
        base = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(scores - base[:, None]), 1)
        row = ((b * G + g) * sizes.heads + head).to(tl.int64) * N + n
        tl.store(scores_ptr + pair_offset(row, key, pitch), scores, mask=inside[:, None])
        tl.store(tops_ptr + row * tiles_m + tile_m, top, mask=inside)
        tl.store(totals_ptr + row * tiles_m + tile_m, total, mask=inside)


@triton.jit
def _statistics(tops_ptr, totals_ptr, row, inside, first, end, tiles_m, ROWS: tl.constexpr):
    """(maximum, sum relative to it) of rows over tiles of keys `[first, end)`."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in tl.range(first, end, 32):
        tile = start + tl.arange(0, 32)[None, :]
        at = row[:, None] * tiles_m + tile
        found = inside[:, None] & (tile < end)
        tops = tl.load(tops_ptr + at, mask=found, other=float("-inf"))
        totals = tl.load(totals_ptr + at, mask=found, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(totals * tl.exp2(tops - base[:, None]), 1)
        top = new_top
    return top, total


@triton.jit(do_not_specialize=[*INTEGERS, "tiles_n", "tiles", "tiles_c", "tiles_m", "splits",
                               "chunk", "pitch"])  # fmt: skip
def cross_attention_shared_products_kernel(
    pairs_ptr, tops_ptr, totals_ptr, k_ptr, out_ptr, lse_ptr, gate_ptr,
    kv_lens, q_lens, q_segments, kv_segments, q_starts, kv_starts, seed,
    k_b, k_h, k_n, out_b, out_h, out_n, gate_b, gate_h, gate_n, threshold, heads, G, N, M,
    factor, tiles_n, tiles, tiles_c, tiles_m, splits, chunk, pitch,
    FORM: tl.constexpr, COLUMNS: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """A program: a tile of rows of (b, g), a block of channels, a split of the keys.

    out = factor * pairs @ k; of scores (SOFTMAX) their softmax, dropped out, and then the gate; the
    LSE is written beside it. Otherwise pairs are taken as they are, in storage type. Rows of out
    are `splits` apart, one for each split.
    """
    sizes = Sizes(heads, G, N, M)
    given = Given(
        kv_lens, q_lens, q_segments, kv_segments, None, None, (0, 0, 0), (0, 0, 0), seed, threshold
    )  # fmt: skip
    pid = tl.program_id(0)
    c = (pid // tiles) % tiles_c * COLUMNS
    part = (pid // tiles // tiles_c) % splits
    g = (pid // tiles // tiles_c // splits) % G
    b = pid // tiles // tiles_c // splits // G
    head, _, n, inside = tile_rows(
        pid % tiles, tiles_n, 0, N, heads, FORM.block_n, FORM.packed
    )  # fmt: skip
    kv_end = length(kv_lens, b, M)
    q_end = length(q_lens, b, N)
    live = inside & (n < q_end)
    own = n
    if q_segments is not None:
        own = tl.load(q_segments + b.to(tl.int64) * N + n, mask=live, other=0)
    low, _, high = key_range(b, n, live, kv_end - q_end, kv_end, own, given, M, FORM)
    h = g * heads + head
    pair_h = h
    if FORM.packed:
        pair_h = h[:, None]
    row = ((b * G + g) * heads + head).to(tl.int64) * N + n
    dead = live == 0
    top = tl.zeros([FORM.block_n], tl.float32)
    weight = tl.full([FORM.block_n], 1.0, tl.float32) * factor
    if SOFTMAX:
        top, total = _statistics(
            tops_ptr, totals_ptr, row, inside, low // FORM.block_m, tl.cdiv(high, FORM.block_m),
            tiles_m, FORM.block_n,
        )  # fmt: skip
        dead = dead | (total == 0.0)
        weight = tl.where(dead, 0.0, weight / total)
        if (c == 0) & (part == 0):
            lse = tl.where(dead, float("-inf"), (top + tl.log2(total)) * LN2)
            tl.store(lse_ptr + row, lse, mask=inside)
        top = tl.where(dead, float("inf"), top)
    low = tl.maximum(low, part * chunk)
    high = tl.minimum(high, (part + 1) * chunk)

    sums = tl.zeros([FORM.block_n, COLUMNS], tl.float32)
    first_key = first_row(kv_starts, b)
    # By number, so that the compiler sees whole tiles and reads pairs 16 bytes at a time.
    for tile_m in tl.range(low // FORM.block_m, tl.cdiv(high, FORM.block_m)):
        start = tile_m * FORM.block_m
        key = start + tl.arange(0, FORM.block_m)
        pairs = tl.load(pairs_ptr + pair_offset(row, key, pitch), mask=inside[:, None], other=0.0)
        k_at = row_offset((k_b, k_h, k_n), b, g, first_key + key, FORM.vec)
        k = load_columns(k_ptr, k_at, key < kv_end, c, FORM.v.size, COLUMNS)
        if SOFTMAX:
            p = tl.exp2(pairs - top[:, None])
            seen = pairs != float("-inf")
            if FORM.dropout:
                p = tl.where(dropout_keep(b, pair_h, n, start, given, sizes, FORM), p, 0.0)
        else:
            p = pairs
            seen = pairs != 0.0
        if FORM.sparse:
            k = tl.where((tl.max((seen & live[:, None]).to(tl.int32), 0) > 0)[:, None], k, 0.0)
        sums = tl.dot(p.to(k.dtype), k, sums, input_precision=FORM.precision)

    sums = tl.where(dead[:, None], 0.0, sums * weight[:, None])
    place = first_row(q_starts, b) + n
    if gate_ptr is not None:
        at = row_offset((gate_b, gate_h, gate_n), b, h, place, 1)
        if FORM.gate == 2:
            logits = load_columns(gate_ptr, at, dead == 0, c, FORM.v.size, COLUMNS)
            sums *= sigmoid(logits.to(tl.float32))
        else:
            logit = tl.load(gate_ptr + at, mask=dead == 0, other=0.0)
            sums *= sigmoid(logit.to(tl.float32))[:, None]
    at = row_offset((out_b, out_h, out_n), b, h, place, FORM.vec) * splits + part * FORM.v.size
    store_columns(out_ptr, at, written_rows(q_starts, inside, live), c, sums, FORM.v.size, COLUMNS)


def products(
    blocks: Blocks,
    pairs: Tensor,
    out: Tensor,
    factor: float,
    statistics: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    lse: Tensor | None = None,
) -> None:
    """`out = factor * pairs @ k`; with `statistics` of the softmax of scores, as for the output."""
    call, form = blocks.call, blocks.form
    softmax = lse is not None
    programs = blocks.groups * blocks.tiles * blocks.tiles_c
    splits, chunk = _tuning.key_splits(programs, call.M, form.block_m)
    made = out
    if splits > 1:
        made = torch.empty(out.numel() * splits, dtype=torch.float32, device=out.device)
    kv_lens, q_lens, q_segments, kv_segments = call.given[:4]
    gate = call.gate if softmax else None
    launch(
        cross_attention_shared_products_kernel, programs * splits, pairs, *statistics, call.k,
        made, lse, gate, kv_lens, q_lens, q_segments, kv_segments, call.q_starts, call.kv_starts,
        call.given[8], *strides_of(call.k, form.vec), *strides_of(out, form.vec),
        *gate_strides(gate), *call.sizes[6:], factor, blocks.tiles_n, blocks.tiles,
        blocks.tiles_c, blocks.tiles_m, splits, chunk, blocks.pitch, FORM=form, SOFTMAX=softmax,
        **blocks.constants(),
    )  # fmt: skip
    if splits > 1:
        column_sums(made.view(1, -1, call.D), [out], splits)
    clear_outside(out, call.q_starts, q_lens, call.N)


def cross_attention_shared_fwd(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of `cross_attention_fwd(q, k, None, *rest)`, for rows of any width."""
    call = Call(q, k, None, *rest)
    out = empty_following(q, call.D)
    lse = torch.empty((call.B, call.H, call.N), dtype=torch.float32, device=q.device)
    blocks = Blocks(call, out)
    form = blocks.form
    scores = blocks.workspace(torch.float32)
    tops, totals = (
        torch.empty((lse.numel(), blocks.tiles_m), dtype=torch.float32, device=q.device)
        for _ in range(2)
    )
    launch(
        cross_attention_shared_scores_kernel, blocks.groups * blocks.tiles * blocks.tiles_m, q, k,
        scores, tops, totals, *call.given, *strides_of(q, form.vec), *strides_of(k, form.vec),
        *call.sizes, call.signed_scale, blocks.tiles_n, blocks.tiles, blocks.tiles_m, blocks.pitch,
        FORM=form, **blocks.constants(),
    )  # fmt: skip
    products(blocks, scores, out, call.keep_scale, (tops, totals), lse)
    return out, lse
