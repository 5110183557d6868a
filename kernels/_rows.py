"""Pieces of the kernels that hold whole rows of `[B, N, C]`: positions, loads, moments, sums.

A tile is `[BLOCK_N, BLOCK_C]`, its rows `(b, n)` with `n` `[BLOCK_N]` and `b` a scalar (a tile
within one item) or `[BLOCK_N]` (a flat tile, rows of several items). Strides come divided by `VEC`,
see `_launch.vector_width`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from mmfast.kernels._blocks import column_sums
from mmfast.kernels._launch import ceil_div, row_strides
from torch import Tensor

# --- in kernels ---------------------------------------------------------------------------------


@triton.jit
def flat_start(first, N):
    """Item and row of the row that is number `first` (64 bits) over all items."""
    b = first // N
    return b, (first - b * N).to(N.dtype)


@triton.jit
def wrap_rows(b, n, N):
    """Items and rows of rows n of item b that may lie past its end, in the items that follow."""
    return b + n // N, n % N


@triton.jit
def row_offset(b, n, stride_b, stride_n, VEC: tl.constexpr):
    """The offset of rows in elements, 64 bits, `[BLOCK_N, 1]`."""
    return ((b.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n) * VEC)[:, None]


@triton.jit
def load_rows(ptr, offset, cols, mask):
    """`[BLOCK_N, BLOCK_C]` in fp32, 0 where `mask` is False."""
    return tl.load(ptr + offset + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_columns(ptr, cols, mask):
    """A `[C]` vector for every row of a tile, in fp32.

    Each thread loads what it needs, from L1: a `[1, BLOCK_C]` tile would go through shared memory.
    """
    pointers = tl.broadcast_to(ptr + cols[None, :], mask.shape)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_mask(ptr, b, n, stride_b, stride_n, live):
    """Row mask `[BLOCK_N]`, True where there is none, False where `live` is."""
    rows = live
    if ptr is not None:
        offset = b.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n
        rows = tl.load(ptr + offset, mask=live, other=0) != 0
    return rows


@triton.jit
def store_rows(ptr, offset, cols, value, mask):
    """Write a tile; the store rounds to the pointer's dtype."""
    tl.store(ptr + offset + cols[None, :], value, mask=mask)


@triton.jit
def merge_moments(mean, m2, count, tile, mask, width):
    """Mean and centred squares of `count` elements and of the `width` of `tile`, merged.

    Chan, Golub, LeVeque 1979: no difference of large sums, whatever the mean.
    """
    tile_mean = tl.sum(tile, axis=1) / width
    centred = tl.where(mask, tile - tile_mean[:, None], 0.0)
    delta = tile_mean - mean
    total = count + width
    m2 += tl.sum(centred * centred, axis=1) + delta * delta * (count * width / total)
    return mean + delta * (width / total), m2, total


# --- launching ----------------------------------------------------------------------------------

_SUM_AT_ONCE = 2048  # more chunks than this are summed in two levels
_SUM_FIRST = 64


def sum_chunks(partials: Tensor, outs: Sequence[Tensor], group: int) -> None:
    """`column_sums`, in two levels where one program would read very many rows."""
    slots, P, C = partials.shape
    if group == P > _SUM_AT_ONCE:
        first = partials.new_empty(slots, ceil_div(P, _SUM_FIRST), C)
        column_sums(partials, list(first), _SUM_FIRST)
        sum_chunks(first, outs, first.size(1))
    else:
        column_sums(partials, outs, group)


def strides_of(*tensors: Tensor | None) -> list[int]:
    """Item and row stride of each, 0 where a tensor is absent or broadcast."""
    return [step for t in tensors for step in ((0, 0) if t is None else row_strides(t))]


def mask_strides(row_mask: Tensor | None) -> tuple[int, int]:
    """Item and row stride of a `[B|1, N|1]` mask, 0 where it is absent or broadcast."""
    if row_mask is None:
        return 0, 0
    B, N = row_mask.shape
    return row_mask.stride(0) if B > 1 else 0, row_mask.stride(1) if N > 1 else 0


def smallest_itemsize(*tensors: Tensor | None) -> int:
    """Of the tensors that are there: 16 bytes of these are 16 or 32 bytes of the others."""
    return min(t.dtype.itemsize for t in tensors if t is not None)


def floats(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised fp32 scratch beside `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
