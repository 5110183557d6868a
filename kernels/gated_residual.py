"""Gated residual: `x + row_mask * act(gate) * y`, forward and backward.

The forward reads x and y once and writes once. The backward reads dout and y once and writes dy
once (dx is dout); the gradient of the gate is summed on the way, in two stages where rows are
summed: partial sums of chunks of rows, which shapes alone determine, then their sum in order.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from mmfast.kernels import _tuning
from mmfast.kernels._blocks import (
    column_sums,
    first_tile,
    gate_activation,
    gate_gradient,
    load_flags,
    load_rows,
    load_side,
    row_offset,
    store_rows,
)
from mmfast.kernels._launch import (
    Layout,
    ceil_div,
    empty_like_rows,
    launch,
    layout,
    row_strides,
)
from torch import Tensor

_INTEGERS = [
    *(
        f"{name}_{dim}"
        for name in ("out", "x", "y", "gate", "mask", "dout", "dy", "dgate")
        for dim in "bn"
    ),
    "N", "C", "tiles_n", "tiles_c", "chunk",
]  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def gated_residual_fwd_kernel(
    out_ptr, x_ptr, y_ptr, gate_ptr, mask_ptr,
    out_b, out_n, x_b, x_n, y_b, y_n, gate_b, gate_n, mask_b, mask_n, N, C, tiles_n, tiles_c,
    ACTIVATION: tl.constexpr, GATE_N: tl.constexpr, GATE_C: tl.constexpr,
    VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile."""
    b, n, c = first_tile(tiles_n, tiles_c, BLOCK_N, BLOCK_C)
    n += tl.arange(0, BLOCK_N)[:, None]
    columns = C.to(tl.int64) * VEC
    mask = (n < N) & (c < columns)
    gate = load_side(gate_ptr, (gate_b, gate_n), b, n, c, N, columns, VEC, GATE_N, GATE_C)
    x = load_rows(x_ptr, (x_b, x_n), b, n, c, mask, VEC)
    if mask_ptr is not None:
        live = load_flags(mask_ptr, (mask_b, mask_n), b, n, N)
        y = load_rows(y_ptr, (y_b, y_n), b, n, c, mask & live, VEC)
        out = tl.where(live, x + gate_activation(gate, ACTIVATION) * y, x)
    else:
        y = load_rows(y_ptr, (y_b, y_n), b, n, c, mask, VEC)
        out = x + gate_activation(gate, ACTIVATION) * y
    store_rows(out_ptr, (out_b, out_n), b, n, c, out, mask, VEC)


@triton.jit
def _gradients(dout, y, gate, live, ACTIVATION: tl.constexpr):
    """dy, and what an element adds to dgate; 0 where a row is not live (None: all are)."""
    value, slope = gate_gradient(gate, ACTIVATION)
    dy = dout * value
    dgate = dout * y * slope
    if live is not None:
        dy = tl.where(live, dy, 0.0)
        dgate = tl.where(live, dgate, 0.0)
    return dy, dgate


@triton.jit(do_not_specialize=_INTEGERS)
def gated_residual_bwd_kernel(
    dout_ptr, y_ptr, dy_ptr, dgate_ptr, gate_ptr, mask_ptr,
    dout_b, dout_n, y_b, y_n, dy_b, dy_n, gate_b, gate_n, mask_b, mask_n, dgate_b, dgate_n,
    N, C, tiles_n, tiles_c, chunk,
    ACTIVATION: tl.constexpr, GATE_N: tl.constexpr, GATE_C: tl.constexpr, SUM: tl.constexpr,
    VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program takes `chunk` rows of an item and a block of columns.

    SUM 0: dgate is like y. 1: dgate is `[items x chunks, C]`, sums over the chunk's rows. 2: it is
    `[items x chunks, column tiles]`, sums over the columns as well.
    """
    b, first, c = first_tile(tiles_n, tiles_c, chunk, BLOCK_C)
    last = tl.minimum(first + chunk, N)
    columns = C.to(tl.int64) * VEC
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    if not GATE_N:
        gate = load_side(gate_ptr, (gate_b, gate_n), b, first, c, N, columns, VEC, GATE_N, GATE_C)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        mask = (n < last) & (c < columns)
        if GATE_N:
            gate = load_side(gate_ptr, (gate_b, gate_n), b, n, c, N, columns, VEC, GATE_N, GATE_C)
        live = None
        if mask_ptr is not None:
            live = load_flags(mask_ptr, (mask_b, mask_n), b, n, N)
            dout = load_rows(dout_ptr, (dout_b, dout_n), b, n, c, mask & live, VEC)
            y = load_rows(y_ptr, (y_b, y_n), b, n, c, mask & live, VEC)
        else:
            dout = load_rows(dout_ptr, (dout_b, dout_n), b, n, c, mask, VEC)
            y = load_rows(y_ptr, (y_b, y_n), b, n, c, mask, VEC)
        dy, dgate = _gradients(dout, y, gate, live, ACTIVATION)
        if dy_ptr is not None:
            store_rows(dy_ptr, (dy_b, dy_n), b, n, c, dy, mask, VEC)
        if dgate_ptr is not None:
            if SUM == 0:
                store_rows(dgate_ptr, (dgate_b, dgate_n), b, n, c, dgate, mask, VEC)
            else:
                total += dgate
    if SUM == 1:
        row = b * tiles_n + first // chunk
        part = tl.sum(total, axis=0, keep_dims=True).to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + row * columns + c, part, mask=c < columns)
    elif SUM == 2:
        part = tl.sum(total).to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + tl.program_id(0), part)


@triton.jit(do_not_specialize=_INTEGERS)
def gated_residual_bwd_rows_kernel(
    dout_ptr, y_ptr, dy_ptr, dgate_ptr, gate_ptr, mask_ptr,
    dout_b, dout_n, y_b, y_n, dy_b, dy_n, gate_b, gate_n, mask_b, mask_n, dgate_b, dgate_n,
    N, C, tiles_n,
    ACTIVATION: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One gate a row: a program takes BLOCK_N rows, all of their columns."""
    b, n, c = first_tile(tiles_n, 1, BLOCK_N, BLOCK_C)
    n += tl.arange(0, BLOCK_N)[:, None]
    columns = C.to(tl.int64) * VEC
    gate = load_side(gate_ptr, (gate_b, gate_n), b, n, c, N, columns, VEC, True, False)
    rows = n < N
    live = None
    if mask_ptr is not None:
        live = load_flags(mask_ptr, (mask_b, mask_n), b, n, N)
        seen = rows & live
    else:
        seen = rows
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for _ in range(0, columns, BLOCK_C):
        mask = seen & (c < columns)
        dout = load_rows(dout_ptr, (dout_b, dout_n), b, n, c, mask, VEC)
        y = load_rows(y_ptr, (y_b, y_n), b, n, c, mask, VEC)
        dy, dgate = _gradients(dout, y, gate, live, ACTIVATION)
        if dy_ptr is not None:
            store_rows(dy_ptr, (dy_b, dy_n), b, n, c, dy, rows & (c < columns), VEC)
        total += dgate
        c += BLOCK_C
    part = tl.sum(total, axis=1, keep_dims=True).to(dgate_ptr.dtype.element_ty)
    tl.store(dgate_ptr + row_offset((dgate_b, dgate_n), b, n, 1), part, mask=rows)


# --- launching ------------------------------------------------------------------------------------


def _layout(
    dense: list[Tensor], narrow: list[Tensor], *, swap: bool = False, free: bool = True
) -> Layout:
    """The layout of `dense`, the first of which has the full shape; swap: items become rows."""
    B, N, C = dense[0].shape
    wide, slim = [row_strides(t) for t in dense], [row_strides(t) for t in narrow]
    if swap:
        B, N = N, B
        wide, slim = [(n, b) for b, n in wide], [(n, b) for b, n in slim]
    return layout((B, N, C), min(t.itemsize for t in dense), wide, slim, free=free)


def _arguments(
    tensors: list[Tensor],
    gate: Tensor,
    row_mask: Tensor | None,
    like_gate: list[Tensor],
    **options: bool,
) -> tuple[Layout, list[int], bool, bool]:
    """The layout; row strides of tensors, gate, mask and like_gate; GATE_N and GATE_C."""
    side, masks = [gate, *like_gate], [] if row_mask is None else [row_mask]
    dense = gate.shape[2] == tensors[0].shape[2]
    rows = _layout([*tensors, *side], masks, **options) if dense else (
        _layout(tensors, [*side, *masks], **options)
    )  # fmt: skip
    all_strides = [*rows.wide, *rows.narrow]
    data, rest = all_strides[: len(tensors)], all_strides[len(tensors) :]
    mask_strides = rest[len(side)] if row_mask is not None else (0, 0)
    gate_n = rest[0][1] != 0
    pairs = [*data, rest[0], mask_strides, *rest[1 : len(side)]]
    return rows, [*chain.from_iterable(pairs)], gate_n, dense


def gated_residual_fwd(
    x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None, activation: int
) -> Tensor:
    """`x + row_mask * act(gate) * y` of `[B, N, C]` tensors; act: 0 tanh, 1 sigmoid, 2 identity.

    A gate whose channels are not dense in memory is copied, everything else is read in place.
    """
    out = empty_like_rows(x)
    if out.numel() == 0:
        return out
    gate = _dense(gate)
    rows, strides, gate_n, gate_c = _arguments([out, x, y], gate, row_mask, [])
    tile = _tuning.tile(rows.columns, x.itemsize)
    tiles_n, tiles_c = ceil_div(rows.N, tile.rows), ceil_div(rows.columns, tile.columns)
    launch(
        gated_residual_fwd_kernel,
        rows.B * tiles_n * tiles_c,
        out,
        x,
        y,
        gate,
        row_mask,
        *strides,
        rows.N,
        rows.C,
        tiles_n,
        tiles_c,
        ACTIVATION=activation,
        GATE_N=gate_n,
        GATE_C=gate_c,
        VEC=rows.vec,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        num_warps=tile.warps,
        **_tuning.OPTIONS,
    )
    return out


def gated_residual_bwd(
    dout: Tensor,
    y: Tensor,
    gate: Tensor,
    row_mask: Tensor | None,
    activation: int,
    need_dy: bool,
    need_dgate: bool,
) -> tuple[Tensor, Tensor]:
    """(dy, dgate), each `[0]` where it is not needed."""
    dy = empty_like_rows(y) if need_dy else y.new_empty(0)
    dgate = empty_like_rows(gate) if need_dgate else gate.new_empty(0)
    if y.numel() == 0:
        return dy, dgate.zero_()
    same = [g == size for g, size in zip(gate.shape, y.shape)]
    gate = _dense(gate)
    wanted = dy if need_dy else None
    if not need_dgate or all(same):
        _elementwise(dout, y, wanted, dgate if need_dgate else None, gate, row_mask, activation)
    elif same[0] and same[1]:
        _sum_channels(dout, y, wanted, dgate, gate, row_mask, activation)
    else:
        _sum_rows(dout, y, wanted, dgate, gate, row_mask, activation, same)
    return dy, dgate


def _dense(gate: Tensor) -> Tensor:
    return gate if gate.shape[2] == 1 or gate.stride(2) == 1 else gate.contiguous()


def _elementwise(
    dout: Tensor,
    y: Tensor,
    dy: Tensor | None,
    dgate: Tensor | None,
    gate: Tensor,
    row_mask: Tensor | None,
    activation: int,
) -> None:
    """dy, and the gradient of a gate of y's shape."""
    if dy is None and dgate is None:
        return
    like_gate = [] if dgate is None else [dgate]
    rows, strides, gate_n, gate_c = _arguments(
        [dout, y, y if dy is None else dy], gate, row_mask, like_gate
    )
    if dgate is None:
        strides += 0, 0
    tile = _tuning.tile(rows.columns, y.itemsize)
    _launch_bwd(
        (dout, y, dy, dgate, gate, row_mask), rows, strides, tile, tile.rows, activation,
        GATE_N=gate_n, GATE_C=gate_c, SUM=0,
    )  # fmt: skip


def _sum_channels(
    dout: Tensor,
    y: Tensor,
    dy: Tensor | None,
    dgate: Tensor,
    gate: Tensor,
    row_mask: Tensor | None,
    activation: int,
) -> None:
    """One gate a row: each program sums its rows."""
    rows, strides, _, _ = _arguments([dout, y, y if dy is None else dy], gate, row_mask, [dgate])
    tile = _tuning.tile(rows.columns, y.itemsize)
    tiles_n = ceil_div(rows.N, tile.rows)
    launch(
        gated_residual_bwd_rows_kernel,
        rows.B * tiles_n,
        dout,
        y,
        dy,
        dgate,
        gate,
        row_mask,
        *strides,
        rows.N,
        rows.C,
        tiles_n,
        ACTIVATION=activation,
        VEC=rows.vec,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        num_warps=tile.warps,
        **_tuning.OPTIONS,
    )


def _sum_rows(
    dout: Tensor,
    y: Tensor,
    dy: Tensor | None,
    dgate: Tensor,
    gate: Tensor,
    row_mask: Tensor | None,
    activation: int,
    same: list[bool],
) -> None:
    """A gate that rows share: `[1, 1, *]`, `[B, 1, *]` or, with items as rows, `[1, N, *]`."""
    one_sum = not same[0] and not same[1]
    rows, strides, _, gate_c = _arguments(
        [dout, y, y if dy is None else dy], gate, row_mask, [], swap=same[1], free=one_sum
    )
    tile = _tuning.tile(rows.columns, y.itemsize)
    tiles_c = ceil_div(rows.columns, tile.columns)
    chunk = _tuning.chunk_rows(rows.N, rows.B * tiles_c, tile.rows)
    chunks = ceil_div(rows.N, chunk)
    columns = rows.columns if gate_c else tiles_c
    parts, group = rows.B * chunks, rows.B * chunks if one_sum else chunks
    if not gate_c:  # column tiles are summed like rows
        parts, group, columns = parts * tiles_c, group * tiles_c, 1
    partials = dgate
    if group > 1:
        partials = dgate.new_empty((1, parts, columns), dtype=torch.float32)
    _launch_bwd(
        (dout, y, dy, partials, gate, row_mask), rows, [*strides, 0, 0], tile, chunk, activation,
        GATE_N=False, GATE_C=gate_c, SUM=1 if gate_c else 2,
    )  # fmt: skip
    if group > 1:
        column_sums(partials, [dgate], group)


def _launch_bwd(
    tensors: tuple[Tensor | None, ...],
    rows: Layout,
    strides: list[int],
    tile: _tuning.Tile,
    chunk: int,
    activation: int,
    **constants: Any,
) -> None:
    tiles_n, tiles_c = ceil_div(rows.N, chunk), ceil_div(rows.columns, tile.columns)
    launch(
        gated_residual_bwd_kernel,
        rows.B * tiles_n * tiles_c,
        *tensors,
        *strides,
        rows.N,
        rows.C,
        tiles_n,
        tiles_c,
        chunk,
        ACTIVATION=activation,
        VEC=rows.vec,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        num_warps=tile.warps,
        **constants,
        **_tuning.OPTIONS,
    )
