"""Rows that are too wide for a program's registers: loads in blocks of columns, tiles, workspaces.

For attention whose values are its keys (`cross_attention_shared`), at any head width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from mmfast.kernels import _tuning
from mmfast.kernels._attention_call import Call, Form, common_vec
from mmfast.kernels._launch import ceil_div
from mmfast.kernels._tuning import SharedTile
from torch import Tensor


@triton.jit
def load_columns(ptr, offset, rows, first, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns from `first` on of rows at `offset`; 0 past SIZE and where `rows` is False."""
    c = first + tl.arange(0, COLUMNS)[None, :]
    mask = rows[:, None]
    if SIZE % COLUMNS != 0:
        mask = mask & (c < SIZE)
    return tl.load(ptr + offset[:, None] + c, mask=mask, other=0.0)


@triton.jit
def store_columns(
    ptr, offset, rows, first, tile, SIZE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Rounds a tile to the pointer's type and writes it to columns from `first` on."""
    c = first + tl.arange(0, COLUMNS)[None, :]
    mask = rows[:, None]
    if SIZE % COLUMNS != 0:
        mask = mask & (c < SIZE)
    tl.store(ptr + offset[:, None] + c, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def pair_offset(row, key, pitch):
    """Of pairs in a workspace `[rows, 16 pitch]`."""
    return row.to(tl.int64)[:, None] * pitch * 16 + key[None, :]


class Blocks:
    """How a call with wide rows is cut, and the workspace of its pairs.

    A workspace has a row for each of B, H, N, as long as whole tiles of keys: `pitch` x 16.
    """

    def __init__(self, call: Call, *tensors: Tensor) -> None:
        self.call = call
        self.tile: SharedTile = _tuning.shared_tile(
            _tuning.arch(call.q.device), call.q.element_size(), call.heads * call.N,
            call.B * call.G, call.M,
        )  # fmt: skip
        packed, self.tiles_n, self.tiles = call.row_tiles(self.tile.rows)
        self.tiles_m = ceil_div(call.M, self.tile.keys)
        self.tiles_c = ceil_div(call.D, self.tile.columns)
        self.pitch = self.tiles_m * self.tile.keys // 16
        self.groups = call.B * call.G
        self.form: Form = call.form._replace(
            vec=common_vec(call.q, call.k, *tensors), block_n=self.tile.rows,
            block_m=self.tile.keys, packed=packed,
        )  # fmt: skip

    def constants(self) -> dict[str, Any]:
        """Constants of every launch."""
        return {
            "COLUMNS": self.tile.columns, "num_warps": self.tile.warps,
            "num_stages": self.tile.stages, **_tuning.OPTIONS,
        }  # fmt: skip

    def workspace(self, dtype: torch.dtype) -> Tensor:
        """`[B, H, N, 16 pitch]`, uninitialised."""
        call = self.call
        shape = call.B, call.H, call.N, 16 * self.pitch
        return torch.empty(shape, dtype=dtype, device=call.q.device)
