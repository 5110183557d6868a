"""Every block size and warp count of the Triton kernels.

Nothing is tuned at run time: the same shapes run the same code on every rank and every day. Those
of the gates follow from bytes in flight, and partial sums are cut in the same places on every
device; those of attention are a table by architecture and head width, and `python -m mmfast tune`
measures them. No kernel here has run on hardware yet (docs/triton-kernels.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from mmfast.kernels._launch import ACCESS_BYTES, ceil_div, power_of_two

OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Launch options of every kernel. Triton 3.9 warns where fp fusion is not asked for or refused."""

WARPS = 4
# Two 16-byte accesses for each of 128 threads and each tensor: at 1,536 threads an SM that keeps
# 48 KiB a tensor in flight, which covers the latency of an H100 (25 bytes/ns an SM, 600 ns) twice.
ACCESSES = 2
HELD = 100  # float32 values that a thread holds across its loads
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
    """Rows and keys of a program's tiles of queries and keys, one of which it keeps; warps; stages
    of the pipeline that loads the others."""

    rows: int
    keys: int
    warps: int
    stages: int


def _tiles(*texts: str) -> tuple[AttentionTile, ...]:
    """Of "rows x keys x warps x stages"."""
    return tuple(AttentionTile(*map(int, text.split("x"))) for text in texts)


class SharedTile(NamedTuple):
    """Rows, keys and channels of the programs of `cross_attention_shared`; warps; stages."""

    rows: int
    keys: int
    columns: int
    warps: int
    stages: int


# Those without spills that the cost model of tools/gpu_model.py ranks best, the default first
# (docs/triton-attention.md); modelled, not measured.
_TABLE: dict[tuple[str, int], dict[str, dict[int, str]]] = {
    ("fwd", 2): {
        "sm_80": {32: "128x128x4x2", 64: "128x64x4x2 128x128x8x2 64x64x4x3",
                  128: "128x128x8x2 128x64x8x2", 256: "64x32x4x2"},
        "sm_86": {32: "128x64x4x2", 64: "128x64x4x2 128x64x8x2", 128: "128x64x8x2 64x64x4x2",
                  256: "64x32x4x2"},
        "sm_90": {32: "64x128x4x3 128x128x8x2", 64: "64x128x4x3 128x128x8x3 128x64x4x3",
                  128: "128x128x8x2 128x64x8x3 64x64x4x3", 256: "128x64x8x2"},
        "sm_100": {32: "128x128x8x3", 64: "128x64x4x3 128x128x8x3", 128: "128x128x8x2 128x64x8x3",
                   256: "128x64x8x2"},
        "gfx942": {32: "128x64x4x2", 64: "64x64x2x2", 128: "128x32x4x2 128x64x4x2",
                   256: "64x32x2x2"},
        "gfx950": {32: "128x64x4x2", 64: "128x64x4x2", 128: "128x64x4x2", 256: "128x32x4x2"},
    },
    ("fwd", 4): {
        "sm_80": {32: "128x32x8x2", 64: "128x32x8x2 32x32x4x2", 128: "32x32x4x2", 256: "16x32x4x2"},
        "sm_86": {32: "64x32x4x2", 64: "32x32x4x2", 128: "32x32x4x2", 256: "16x16x4x2"},
        "sm_90": {32: "128x32x8x2", 64: "128x32x8x2 64x32x4x2", 128: "64x16x4x2 32x32x4x2",
                  256: "16x32x4x2"},
        "sm_100": {32: "128x32x8x2", 64: "128x32x8x2", 128: "32x32x4x2", 256: "16x32x4x2"},
        "gfx942": {32: "64x32x2x2", 64: "64x32x2x2", 128: "32x32x1x1", 256: "32x16x2x1"},
        "gfx950": {32: "64x32x2x2", 64: "64x32x2x2", 128: "32x32x1x1", 256: "32x16x2x1"},
    },
    ("dq", 2): {
        "sm_80": {32: "128x64x4x2", 64: "128x32x4x2 128x64x8x2", 128: "64x64x4x2 128x32x8x2",
                  256: "32x32x4x2"},
        "sm_86": {32: "128x64x4x2", 64: "128x32x4x2", 128: "64x64x4x2", 256: "32x32x4x1"},
        "sm_90": {32: "128x64x4x2", 64: "128x128x8x2 64x64x4x2", 128: "128x64x8x2 64x64x4x2",
                  256: "128x32x8x2"},
        "sm_100": {32: "128x64x4x2", 64: "128x64x8x2", 128: "128x64x8x2", 256: "128x32x8x2"},
        "gfx942": {32: "64x64x2x1", 64: "64x64x2x1", 128: "64x32x2x1", 256: "64x16x2x1"},
        "gfx950": {32: "64x64x2x1", 64: "64x64x2x1", 128: "64x32x2x1", 256: "64x16x2x1"},
    },
    ("dq", 4): {
        **{
            arch: {32: "32x32x2x2", 64: "32x32x4x2", 128: "16x32x4x2", 256: "16x16x4x1"}
            for arch in ("sm_80", "sm_86", "sm_90", "sm_100")
        },
        **{
            arch: {32: "32x32x1x1", 64: "32x32x1x1", 128: "32x16x1x1", 256: "32x16x2x1"}
            for arch in ("gfx942", "gfx950")
        },
    },
    ("dkv", 2): {
        "sm_80": {32: "64x128x4x2", 64: "64x128x8x2", 128: "32x128x8x2", 256: "32x32x4x2"},
        "sm_86": {32: "64x64x4x2", 64: "64x128x8x2", 128: "32x64x4x2", 256: "16x32x4x1"},
        "sm_90": {32: "64x64x4x2 64x128x8x2", 64: "64x128x8x2", 128: "32x128x8x2 32x64x4x2",
                  256: "32x32x4x2"},
        "sm_100": {32: "64x64x4x2", 64: "64x128x8x2", 128: "64x128x8x2", 256: "32x32x4x2"},
        "gfx942": {32: "32x64x2x1", 64: "32x64x2x1", 128: "32x64x2x1", 256: "16x32x1x1"},
        "gfx950": {32: "32x64x2x1", 64: "32x64x2x1", 128: "32x64x2x1", 256: "16x32x1x1"},
    },
    ("dkv", 4): {
        **{
            arch: {32: "32x32x2x2", 64: "32x32x4x2", 128: "16x16x2x2", 256: "16x16x2x1"}
            for arch in ("sm_80", "sm_86", "sm_90", "sm_100")
        },
        **{
            arch: {32: "32x32x1x1", 64: "32x32x1x1", 128: "16x32x1x1", 256: "16x32x2x1"}
            for arch in ("gfx942", "gfx950")
        },
    },
    ("pairs", 2): {
        "sm_80": {32: "64x64x4x1", 64: "64x64x4x1", 128: "64x32x4x1", 256: "64x16x4x1"},
        "sm_86": {32: "64x64x4x1", 64: "64x32x4x1", 128: "64x32x4x1", 256: "64x16x4x1"},
        "sm_90": {32: "64x64x4x1", 64: "64x64x4x1", 128: "64x64x4x1", 256: "64x32x4x1"},
        "sm_100": {32: "64x64x4x1", 64: "64x64x4x1", 128: "64x64x4x1", 256: "64x32x4x1"},
        "gfx942": {32: "64x64x2x1", 64: "64x64x2x1", 128: "64x32x2x1", 256: "64x32x2x1"},
        "gfx950": {32: "64x64x2x1", 64: "64x64x2x1", 128: "64x32x2x1", 256: "64x32x2x1"},
    },
    ("pairs", 4): {
        **{
            arch: {32: "32x32x2x1", 64: "32x16x2x1", 128: "16x32x2x1", 256: "16x16x2x1"}
            for arch in ("sm_80", "sm_86")
        },
        **{
            arch: {32: "32x32x2x1", 64: "32x16x2x1", 128: "32x16x2x1", 256: "16x16x2x1"}
            for arch in ("sm_90", "sm_100")
        },
        **{
            arch: {32: "32x32x1x1", 64: "32x16x2x1", 128: "32x16x2x1", 256: "16x16x2x1"}
            for arch in ("gfx942", "gfx950")
        },
    },
}  # fmt: skip

ATTENTION: dict[tuple[str, str, int, int], tuple[AttentionTile, ...]] = {
    (kernel, name, width, itemsize): _tiles(*texts.split())
    for (kernel, itemsize), archs in _TABLE.items()
    for name, widths in archs.items()
    for width, texts in widths.items()
}
"""(kernel, architecture class, width class, itemsize) -> configurations, the default first."""

Key = tuple[str, int, int, int, int]
"""(kernel, width class, itemsize, rows class, keys class). Classes are powers of two."""

TUNED: dict[Key, AttentionTile] = {}
"""What goes before everything else: for measuring."""

# The interpreter's: several tiles of keys in small problems, and no two sides alike.
_INTERPRETED = {
    "fwd": AttentionTile(64, 32, 4, 1),
    "dq": AttentionTile(64, 32, 4, 1),
    "dkv": AttentionTile(32, 64, 4, 1),
    "pairs": AttentionTile(32, 64, 4, 1),
}

SMALLEST_SIDE, MOST_KEYS_CLASS = 16, 4096
# Programs that fill a device: two for each of 128 multiprocessors. Where there are fewer, sums are
# cut into splits; the number is the same for every device, and with it the order of the sums.
ATTENTION_PROGRAMS = 256
MIN_TILES_OF_SPLIT = 2
DESCRIPTOR_WORK = 2 * 10**9
MOST_SPLITS = 32


@lru_cache(maxsize=64)
def arch(device: torch.device) -> str:
    """As sm_90 or gfx942; "interpreted" off the GPU."""
    if device.type != "cuda":
        return "interpreted"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def arch_class(name: str) -> str:
    """The row of the table for an architecture: those with the same instructions and memory."""
    if name.startswith("gfx"):
        return "gfx950" if name == "gfx950" else "gfx942"
    number = int(name.removeprefix("sm_"))
    if number in (80, 87):
        return "sm_80"
    if number < 90 or number >= 120:
        return "sm_86"
    return "sm_90" if number < 100 else "sm_100"


@lru_cache(maxsize=64)
def halves(name: str, itemsize: int) -> tuple[int, int]:
    """The widths from which queries and keys, and values, are held in two halves.

    Half a tile at a time leaves registers: always where they are scarce, and from 128 on where
    products take their operands from registers (later tensor cores read shared memory).
    """
    from_registers = name.startswith("sm_") and arch_class(name) in ("sm_80", "sm_86")
    return (128, 128) if itemsize == 4 or from_registers else (256, 256)


def wants_descriptors(name: str, work: int) -> bool:
    """Are keys and values to be read by the tensor memory accelerator?

    It saves registers and instructions, and costs some microseconds of the host's at each launch:
    `work`, of B H N M (D + Dv), has to be worth them (10 us at 400 TFLOP/s).
    """
    if not name.startswith("sm_") or int(name.removeprefix("sm_")) < 90:
        return False
    return work >= DESCRIPTOR_WORK


def precision(device: torch.device, dtype: torch.dtype) -> str:
    """How products of float32 are made: as torch.matmul would, but never slower than needed.

    "tf32x3" is float32 by three products of 11-bit halves, on tensor cores; "tf32" is taken where
    torch.backends.cuda.matmul.fp32_precision allows it. AMD has float32 matrix instructions.
    """
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip:
        return "ieee"
    chosen = torch.backends.cuda.matmul.fp32_precision
    if chosen == "none":
        chosen = torch.backends.fp32_precision
    return "tf32" if chosen == "tf32" else "tf32x3"


@lru_cache(maxsize=16)
def tuned(device: torch.device) -> Mapping[Key, AttentionTile]:
    """What the user has had measured on this device, from his file; read once."""
    if device.type != "cuda":
        return {}
    from mmfast.kernels import _tune

    return _tune.load(device)


def attention_tile(
    kernel: str,
    name: str,
    width: int,
    itemsize: int,
    rows: int,
    keys: int,
    pairs: bool = False,
    measured: Mapping[Key, AttentionTile] = MappingProxyType({}),
) -> AttentionTile:
    """The configuration of a kernel: what was measured on this device, or the table's default.

    kernel: "fwd", "dq", "dkv" or "pairs". width: the larger of the head widths, as it is padded.
    rows: of all heads that share a key head. pairs: masks, segments, a bias or dropout take
    registers for each pair, and the tile is half as large: the side that the warps do not share.
    """
    if name == "interpreted":
        return _INTERPRETED[kernel]
    found = None
    if TUNED or measured:
        key = (kernel, *_classes(width, itemsize, rows, keys))
        found = TUNED.get(key) or measured.get(key)
    if found is None:
        found = attention_candidates(kernel, name, width, itemsize, rows, keys)[0]
    if pairs and kernel != "pairs":
        side = "rows" if kernel == "dkv" else "keys"
        found = found._replace(**{side: max(SMALLEST_SIDE, getattr(found, side) // 2)})
    return found


@lru_cache(maxsize=1024)
def attention_candidates(
    kernel: str, name: str, width: int, itemsize: int, rows: int, keys: int
) -> tuple[AttentionTile, ...]:
    """The configurations worth trying, the default first: no side much larger than the problem."""
    width, itemsize, rows, keys = _classes(width, itemsize, rows, keys)
    found: list[AttentionTile] = []
    for one in ATTENTION[kernel, arch_class(name), width, itemsize]:
        fitted = one._replace(rows=min(one.rows, rows), keys=min(one.keys, keys))
        if fitted.rows * fitted.keys < one.rows * one.keys:
            fitted = fitted._replace(warps=min(one.warps, 4))
        if fitted not in found:
            found.append(fitted)
    return tuple(found)


def _classes(width: int, itemsize: int, rows: int, keys: int) -> tuple[int, int, int, int]:
    return (
        max(32, power_of_two(width)), itemsize, max(SMALLEST_SIDE, power_of_two(rows)),
        min(MOST_KEYS_CLASS, max(SMALLEST_SIDE, power_of_two(keys))),
    )  # fmt: skip


def shared_tile(name: str, itemsize: int, rows: int, groups: int, keys: int) -> SharedTile:
    """The block sizes of `cross_attention_shared`; modelled, not measured.

    rows: of all heads that share the context; groups: contexts. 128 bytes of a row at a time; small
    tiles of keys until there are enough to fill a device.
    """
    if name == "interpreted":
        return SharedTile(16, 32, 128, 4, 1)
    wide = 64 if itemsize == 2 else 32
    block = min(64, max(SMALLEST_SIDE, power_of_two(rows)))
    programs = groups * ceil_div(rows, block) * ceil_div(keys, wide)
    side = wide if programs >= ATTENTION_PROGRAMS else wide // 2
    side = min(side, max(SMALLEST_SIDE, power_of_two(keys)))
    return SharedTile(block, side, 128 // itemsize, 4, 2 if name.startswith("gfx") else 4)


def splits(programs: int, tiles: int) -> int:
    """How often to cut a loop over so many tiles where there are so many programs without."""
    if programs == 0 or tiles == 0:
        return 1
    most = max(1, min(ATTENTION_PROGRAMS // programs, tiles // MIN_TILES_OF_SPLIT, MOST_SPLITS))
    return ceil_div(tiles, ceil_div(tiles, most))


def key_splits(programs: int, keys: int, block: int) -> tuple[int, int]:
    """(splits, keys of a split): `splits` of a loop over the keys, whole tiles of them."""
    tiles = ceil_div(keys, block)
    count = splits(programs, tiles)
    return count, ceil_div(tiles, count) * block
