"""Every block size and warp count of the Triton kernels, chosen from shapes alone.

Nothing is tuned at run time: the same shapes run the same code on every rank and every day, and
partial sums are cut in the same places on every device. The sizes follow from bytes in flight, not
from measurement: no kernel here has run on hardware yet (docs/triton-kernels.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mmfast.kernels._launch import ACCESS_BYTES, ceil_div, power_of_two

OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Launch options of every kernel. Triton 3.9 warns where fp fusion is not asked for or refused."""

WARPS = 4
# Two 16-byte accesses for each of 128 threads and each tensor: at 1,536 threads an SM that keeps
# 48 KiB a tensor in flight, which covers the latency of an H100 (25 bytes/ns an SM, 600 ns) twice.
ACCESSES = 2
HELD = 96  # float32 values that a thread holds across its loads
MIN_COLUMNS = 128  # 256 contiguous bytes or more for 16-bit storage

# Programs of a kernel that sums over rows: one wave of four-warp programs on a large GPU.
REDUCTION_PROGRAMS = 1024
MIN_CHUNK_TILES = 4


class Tile(NamedTuple):
    """A program's block: rows x columns, with so many warps."""

    rows: int
    columns: int
    warps: int


def tile(C: int, itemsize: int, terms: int = 1) -> Tile:
    """The block of an elementwise kernel over rows of C channels.

    `terms` is how many values of each element a thread holds at once (modalities, for example): the
    block shrinks with it, so that registers suffice.
    """
    each = ACCESSES * ACCESS_BYTES // itemsize
    while each > 1 and each * terms > HELD:
        each //= 2
    elements = WARPS * 32 * each
    columns = column_block(C, elements)
    return Tile(elements // columns, columns, WARPS)


def column_block(C: int, most: int) -> int:
    """The power of two that leaves the fewest lanes idle; the largest of equals."""
    if most >= C <= MIN_COLUMNS:
        return power_of_two(C)
    best = block = min(most, power_of_two(C))
    while block > MIN_COLUMNS:
        block //= 2
        if ceil_div(C, block) * block < ceil_div(C, best) * best:
            best = block
    return best


def chunk_rows(rows: int, groups: int, block_rows: int) -> int:
    """Rows that one program sums when each of `groups` sums runs over `rows`.

    A multiple of `block_rows`: enough chunks for the whole device, few enough that writing and
    reading their partial sums costs little beside the rows themselves.
    """
    chunks = max(1, REDUCTION_PROGRAMS // max(1, groups))
    tiles = max(MIN_CHUNK_TILES, ceil_div(ceil_div(rows, block_rows), chunks))
    return tiles * block_rows


# --- attention ------------------------------------------------------------------------------------


class AttentionTile(NamedTuple):
    """A program's tile of queries and the tile of keys that it takes at a time."""

    rows: int
    keys: int
    warps: int
    stages: int


_LADDER = (16, 32, 64, 128)
ATTENTION: Mapping[tuple[str, str, int, int], tuple[AttentionTile, ...]] = {}
"""(kernel, architecture class, width class, itemsize) -> configurations, the default first."""


TUNED: dict[tuple[Any, ...], AttentionTile] = {}
ATTENTION_PROGRAMS = 256
MIN_TILES_OF_SPLIT = 2
MOST_SPLITS = 32


def precision(q):
    return "ieee" if q.element_size() == 2 else "tf32x3"


def arch(device):
    return "sm_90"


def attention_tile(kernel, arch, width, itemsize, rows, keys):
    return AttentionTile(16, 32, 4, 2)


def splits(programs: int, tiles: int) -> int:
    """How often to cut a loop over so many tiles where there are so many programs without."""
    if programs == 0:
        return 1
    most = max(1, min(ATTENTION_PROGRAMS // programs, tiles // MIN_TILES_OF_SPLIT, MOST_SPLITS))
    return ceil_div(tiles, ceil_div(tiles, most)) if tiles else 1


def key_splits(programs: int, keys: int, block: int) -> tuple[int, int]:
    """(splits, keys of a split): `splits` of a loop over the keys, whole tiles of them."""
    tiles = ceil_div(keys, block)
    count = splits(programs, tiles)
    return count, ceil_div(tiles, count) * block
