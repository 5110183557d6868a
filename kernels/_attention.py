"""Pieces of the attention kernels: tiles of rows, ranges of keys, loads, allowed pairs, dropout.

A tile of rows belongs to one key head. Where heads share keys and have few queries each, a tile is
packed: it goes on into the next head's queries (`tile_rows`). Coordinates of rows and keys come as
`[rows, 1]` and `[1, keys]`, or as `[1, rows]` and `[keys, 1]`: everything here broadcasts, so one
definition serves both orientations of the score matrix.

A width that is no power of two is held in two parts (72 as 64 and 16), the last one padded, because
block sizes are powers of two; a tile of rows is a tuple of its parts. `WIDTH` is a
`_attention_call.Width`.

Scores are in units of log 2: `scale` comes multiplied by log2(e), and exponentials are exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mmfast.kernels._blocks import sigmoid

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_LEAST = tl.constexpr(-2147483648)
_GREATEST = tl.constexpr(2147483647)

# --- which rows, which keys ---------------------------------------------------------------------


@triton.jit
def tile_rows(tile, tiles_n, first, N, heads, BLOCK_N: tl.constexpr, PACKED: tl.constexpr):
    """(head within the group, first query, queries `[BLOCK_N]`, is there such a row) of a tile.

    Packed: the tile's rows are numbered through all heads of the group, heads are `[BLOCK_N]`.
    Otherwise a head, a scalar, has `tiles_n` tiles, which begin at query `first`.
    """
    i = tl.arange(0, BLOCK_N)
    if PACKED:
        r = tile * BLOCK_N + i
        head = r // N
        n = r % N
        begin = first
        inside = head < heads
    else:
        head = tile // tiles_n
        begin = first + (tile % tiles_n) * BLOCK_N
        n = begin + i
        inside = n < N
    return head, begin, n, inside


@triton.jit
def length(ptr, b, longest):
    """The item's length, within what there is: `longest` where no lengths are given."""
    if ptr is not None:
        return tl.minimum(tl.maximum(tl.load(ptr + b), 0), longest)
    else:
        return longest


@triton.jit
def first_row(starts, b):
    """Where the rows of item b begin in a packed tensor, whose stride of dim B is 0; else 0."""
    if starts is not None:
        return tl.load(starts + b)
    else:
        return b * 0


@triton.jit
def written_rows(starts, inside, live):
    """The rows that a result has: in a packed tensor what follows an item's length is another's."""
    if starts is not None:
        return live
    else:
        return inside


@triton.jit
def segment_span(ptr, count, low, high):
    """First, and one past the last, of `count` positions whose segment is in `[low, high]`.

    (count, 0) where there is none. One pass over a few thousand integers at most.
    """
    first = count
    end = count * 0
    for start in tl.range(0, count, 512):
        i = start + tl.arange(0, 512)
        segment = tl.load(ptr + i, mask=i < count, other=0)
        found = (i < count) & (segment >= low) & (segment <= high)
        first = tl.minimum(first, tl.min(tl.where(found, i, count)))
        end = tl.maximum(end, tl.max(tl.where(found, i + 1, 0)))
    return first, end


@triton.jit
def key_range(b, n, live, shift, kv_end, own_segments, given, M, FORM: tl.constexpr):
    """(low, full, high): the keys that rows n may see lie in `[low, high)`, whole tiles of them.

    Every live row sees all of `[low, full)`, as far as lengths and causality go; with a mask or
    segments (FORM.sparse), as far as lengths go. `high` is not rounded up. low >= high where there
    is nothing.
    """
    low = kv_end * 0
    high = tl.where(tl.max(live.to(tl.int32)) > 0, kv_end, 0)
    full = high
    if FORM.causal:
        last = tl.max(tl.where(live, n, -1))
        least = tl.min(tl.where(live, n, _GREATEST - M))
        high = tl.minimum(high, tl.maximum(last + 1 + shift, 0))
        full = tl.minimum(high, tl.maximum(least + 1 + shift, 0))
    full = full // FORM.block_m * FORM.block_m
    if given.kv_segments is not None:
        greatest = tl.max(tl.where(live, own_segments, _LEAST))
        smallest = tl.minimum(greatest, _LEAST)
        if not FORM.at_most:
            smallest = tl.min(tl.where(live, own_segments, _GREATEST))
        first, high = segment_span(given.kv_segments + b.to(tl.int64) * M, high, smallest, greatest)
        low = tl.minimum(first, high) // FORM.block_m * FORM.block_m
    if FORM.sparse:
        full = tl.maximum(low, high // FORM.block_m * FORM.block_m)
    return low, full, high


# --- loads and stores of rows -------------------------------------------------------------------


@triton.jit
def row_offset(strides, b, h, n, VEC: tl.constexpr):
    """Where rows (b, h, n) begin, in elements; `strides` are in units of VEC elements."""
    position = b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    return (position + n.to(tl.int64) * strides[2]) * VEC


@triton.jit
def load_queries(
    ptr, strides, b, h, item, begin, n, rows, WIDTH: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    """The parts of a tile of rows (b, h, n), which `tile_rows` has made; item: see `first_row`."""
    if FORM.packed:
        return load_rows(ptr, row_offset(strides, b, h, item + n, FORM.vec), rows, WIDTH)
    else:
        i = tl.arange(0, FORM.block_n)
        if FORM.far:
            i = i.to(tl.int64)
        ptr += row_offset(strides, b, h, item + begin, FORM.vec)
        return load_rows(ptr, i * strides[2] * FORM.vec, rows, WIDTH)


@triton.jit
def load_keys(
    ptr, described, b, g, stride, start, inside, WIDTH: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """The parts of `block_m` rows of (b, g) from row `start` of the tensor on; ptr: of its row 0.

    A packed tensor (`first_row`) has one item, b = 0.

    inside: which of them are to be read; None is all of them, and those are read by a tensor
    descriptor where there is one. `stride` is in units of vec elements. What does not change from
    tile to tile is kept apart, in 32 bits where it fits.
    """
    if (described is not None) and (inside is None):
        first = described.load([b, g, start, 0]).reshape([FORM.block_m, WIDTH.first])
        if WIDTH.second == 0:
            return (first,)
        else:
            second = described.load([b, g, start, WIDTH.first])
            return (first, second.reshape([FORM.block_m, WIDTH.second]))
    else:
        i = tl.arange(0, FORM.block_m)
        if FORM.far:
            offset = i.to(tl.int64) * stride * FORM.vec
        else:
            offset = i * stride * FORM.vec
        begin = stride.to(tl.int64) * start * FORM.vec
        return load_rows(ptr + begin, offset, inside, WIDTH)


@triton.jit
def _load_part(ptr, offset, rows, SIZE: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    d = FIRST + tl.arange(0, BLOCK)[None, :]
    pointers = ptr + offset[:, None] + d
    if FIRST + BLOCK > SIZE:
        mask = d < SIZE
        if rows is not None:
            mask = mask & rows[:, None]
        part = tl.load(pointers, mask=mask, other=0.0)
    elif rows is not None:
        part = tl.load(pointers, mask=rows[:, None], other=0.0)
    else:
        part = tl.load(pointers)
    return part


@triton.jit
def load_rows(ptr, offset, rows, WIDTH: tl.constexpr):
    """The parts of rows at `offset`, in storage type; 0 where `rows` is False (None: all are)."""
    first = _load_part(ptr, offset, rows, WIDTH.size, 0, WIDTH.first)
    if WIDTH.second == 0:
        return (first,)
    else:
        return (first, _load_part(ptr, offset, rows, WIDTH.size, WIDTH.first, WIDTH.second))


@triton.jit
def _store_part(ptr, offset, rows, part, SIZE: tl.constexpr, FIRST: tl.constexpr):
    BLOCK: tl.constexpr = part.shape[1]
    d = FIRST + tl.arange(0, BLOCK)[None, :]
    mask = rows[:, None]
    if FIRST + BLOCK > SIZE:
        mask = mask & (d < SIZE)
    tl.store(ptr + offset[:, None] + d, part.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(ptr, offset, rows, parts, WIDTH: tl.constexpr):
    """Rounds the parts of rows to the pointer's type and writes them."""
    _store_part(ptr, offset, rows, parts[0], WIDTH.size, 0)
    if len(parts) == 2:
        _store_part(ptr, offset, rows, parts[1], WIDTH.size, WIDTH.first)


# --- arithmetic on parts ------------------------------------------------------------------------


@triton.jit
def zeros(rows: tl.constexpr, WIDTH: tl.constexpr):
    """Sums to begin with, in float32."""
    first = tl.zeros([rows, WIDTH.first], tl.float32)
    if WIDTH.second == 0:
        return (first,)
    else:
        return (first, tl.zeros([rows, WIDTH.second], tl.float32))


@triton.jit
def scaled(parts, factor):
    """Each row times its factor."""
    first = parts[0] * factor[:, None]
    if len(parts) == 1:
        return (first,)
    else:
        return (first, parts[1] * factor[:, None])


@triton.jit
def only(parts, rows):
    """Zeros in the rows where `rows` is False, whatever was there."""
    first = tl.where(rows[:, None], parts[0], 0.0)
    if len(parts) == 1:
        return (first,)
    else:
        return (first, tl.where(rows[:, None], parts[1], 0.0))


@triton.jit
def times(a, b):
    """Part by part."""
    first = a[0] * b[0]
    if len(a) == 1:
        return (first,)
    else:
        return (first, a[1] * b[1])


@triton.jit
def plus(a, b):
    """Part by part."""
    first = a[0] + b[0]
    if len(a) == 1:
        return (first,)
    else:
        return (first, a[1] + b[1])


@triton.jit
def inner(a, b, PRECISION: tl.constexpr):
    """`a @ b^T`: the inner products of all rows of a with all rows of b, in float32."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) == 2:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision=PRECISION)
    return product


@triton.jit
def add_product(sums, p, b, PRECISION: tl.constexpr):
    """`sums + p @ b`."""
    first = tl.dot(p, b[0], sums[0], input_precision=PRECISION)
    if len(sums) == 1:
        return (first,)
    else:
        return (first, tl.dot(p, b[1], sums[1], input_precision=PRECISION))


# --- pairs --------------------------------------------------------------------------------------


@triton.jit
def load_pairs(
    ptr, strides, b, h, n, m, rows, end, DIMS: tl.constexpr, VEC: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Of a `[B|1, H|1, N|1, M|1]` tensor what rows (b, h, n) and keys m need, no larger than
    they are; 0 outside. DIMS: 4 it has heads, 2 queries, 1 keys (whose stride is 1). `strides` of
    the first three dims, in units of VEC elements, 0 where the size is 1. WHOLE: all m < end, which
    the compiler then knows: loads are wide.
    """
    offset = b.to(tl.int64) * strides[0]
    if DIMS & 4:
        offset += h.to(tl.int64) * strides[1]
    if DIMS & 2:
        offset = offset + n.to(tl.int64) * strides[2]
    offset = offset * VEC
    if DIMS & 1:
        offset = offset + m
        if not WHOLE:
            if DIMS & 6:
                inside = rows & (m < end)
            else:
                inside = m < end
        elif DIMS & 6:
            inside = rows & (m >= 0)
        else:
            inside = m >= 0
    else:
        inside = rows
    if DIMS == 0:
        return tl.load(ptr + offset)
    else:
        return tl.load(tl.broadcast_to(ptr + offset, inside.shape), mask=inside, other=0)


@triton.jit
def may_attend(
    b, h, n, m, rows, kv_end, shift, own_segments, given, M, WHOLE: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    """May rows (b, h, n) attend to keys m? `rows` (not those outside) by length, causality,
    segments and mask. WHOLE: all keys are within the length.
    """
    allowed = rows
    if not WHOLE:
        allowed = allowed & (m < kv_end)
    if FORM.causal:
        allowed = allowed & (m <= n + shift)
    if given.kv_segments is not None:
        pointers = given.kv_segments + b.to(tl.int64) * M + m
        if WHOLE:
            segment = tl.load(pointers)
        else:
            segment = tl.load(pointers, mask=m < kv_end, other=0)
        if FORM.at_most:
            allowed = allowed & (segment <= own_segments)
        else:
            allowed = allowed & (segment == own_segments)
    if given.mask is not None:
        flags = load_pairs(
            given.mask, given.mask_strides, b, h, n, m, rows, kv_end, FORM.mask_dims,
            FORM.mask_vec, WHOLE,
        )  # fmt: skip
        allowed = allowed & (flags != 0)
    return allowed


@triton.jit
def load_bias(b, h, n, m, rows, kv_end, given, WHOLE: tl.constexpr, FORM: tl.constexpr):
    """The bias of pairs in units of log 2, float32; 0 where there is none."""
    if given.bias is not None:
        bias = load_pairs(
            given.bias, given.bias_strides, b, h, n, m, rows, kv_end, FORM.bias_dims,
            FORM.bias_vec, WHOLE,
        )  # fmt: skip
        return bias.to(tl.float32) * LOG2E
    else:
        return 0.0


@triton.jit
def dropout_keep(b, h, n, start, given, sizes, FORM: tl.constexpr):
    """`[block_n, block_m]`: which weights of rows n survive, of the keys from `start` on.

    Philox4x32-10 as in `reference.philox`: counter (n, m / 4, low and high word of b H + h),
    element m takes word m % 4. h: a scalar or `[block_n, 1]`.
    """
    zero = tl.zeros([FORM.block_n, FORM.block_m // 4], tl.uint32)
    quad = start // 4 + tl.arange(0, FORM.block_m // 4)
    row = b.to(tl.int64) * sizes.G * sizes.heads + h
    c2 = (row & 0xFFFFFFFF).to(tl.uint32)
    c3 = (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(given.seed), zero + n.to(tl.uint32)[:, None], zero + quad.to(tl.uint32)[None, :],
        zero + c2, zero + c3,
    )  # fmt: skip
    even = tl.interleave(_survives(w0, given.threshold), _survives(w2, given.threshold))
    odd = tl.interleave(_survives(w1, given.threshold), _survives(w3, given.threshold))
    return tl.interleave(even, odd) != 0


@triton.jit
def _survives(word, threshold):
    """word >= threshold + 2^31 of unsigned 32-bit numbers, as a byte."""
    return ((word ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold).to(tl.int8)


# --- the gate -----------------------------------------------------------------------------------


@triton.jit
def load_gate(ptr, strides, b, h, n, rows, FORM: tl.constexpr):
    """sigmoid(gate) of rows, as parts: `[rows, DV]`, or `[rows, 1]` for one logit a head."""
    offset = row_offset(strides, b, h, n, 1)
    if FORM.gate == 2:
        logits = load_rows(ptr, offset, rows, FORM.v)
        first = sigmoid(logits[0].to(tl.float32))
        if len(logits) == 1:
            return (first,)
        else:
            return (first, sigmoid(logits[1].to(tl.float32)))
    else:
        logit = tl.load(ptr + offset, mask=rows, other=0.0)
        weight = sigmoid(logit.to(tl.float32))[:, None]
        if FORM.v.second == 0:
            return (weight,)
        else:
            return (weight, weight)
