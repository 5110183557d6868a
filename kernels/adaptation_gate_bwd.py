"""The backward of `adaptation_gate`: every gradient in one pass over the data.

With `y = z + alpha * h`, `xhat = (y - mean(y)) * rstd`, `g = dout * weight`:

    dy = rstd * (g - mean(g) - xhat * mean(g * xhat))
    dz = dy + (sum(dy * h) * alpha / |z|^2) * z
    dh = alpha * dy - (sum(dy * h) * alpha / |h|^2) * h
    dweight = sum(dout * xhat);  dbias = sum(dout)

The second terms of dz and dh are there where `beta * |z| / |h| < 1`: elsewhere alpha is a constant.
The one of dz is 0 at z = 0. A program takes a chunk of rows and keeps its column sums in registers;
`column_sums` adds the chunks in a fixed order. Rows past `MAX_TILE_C` are split into blocks of
columns, after a kernel that writes what is needed of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from mmfast.kernels import _launch
from mmfast.kernels._launch import ceil_div, empty_like_rows, power_of_two
from mmfast.kernels._rows import (
    flat_start,
    floats,
    load_columns,
    load_mask,
    load_rows,
    mask_strides,
    row_offset,
    smallest_itemsize,
    store_rows,
    strides_of,
    sum_chunks,
    wrap_rows,
)
from mmfast.kernels._tuning import OPTIONS, chunk_rows
from mmfast.kernels.adaptation_gate import gate_alpha, long_row_moments
from torch import Tensor

MAX_TILE_C = 8192
_LOOP_C = 4096
_SPLIT_C = 1024
_TILE = 1024  # elements of a tile of short rows: 8 a thread with 4 warps, beside the sums
_STATS = 7  # of a long row: alpha, mean, rstd, mean(g), mean(g * xhat), factors of z and of h

_INTS = [
    *(f"stride_{name}_{dim}" for name in ("z", "dout", "h", "m", "dz", "dh") for dim in "bn"),
    "total_rows",
    "N",
    "C",
    "chunk",
]
_STATS_INTS = [*(f"stride_{name}_{dim}" for name in ("z", "dout", "h", "m") for dim in "bn"),
               "N", "C"]  # fmt: skip


@triton.jit(do_not_specialize=_INTS)
def adaptation_gate_bwd_kernel(
    z_ptr, dout_ptr, h_ptr, weight_ptr, row_mask_ptr, stats_ptr,
    dz_ptr, dh_ptr, sum_weight_ptr, sum_bias_ptr,
    stride_z_b, stride_z_n, stride_dout_b, stride_dout_n, stride_h_b, stride_h_n,
    stride_m_b, stride_m_n, stride_dz_b, stride_dz_n, stride_dh_b, stride_dh_n,
    total_rows, N, C, chunk, beta, eps,
    VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A chunk of rows, counted over all items; `SPLIT`: one block of their columns.

    sum_<name>_ptr is `[chunks, C]`.
    """
    C = C * VEC
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    if SPLIT:
        blocks = tl.cdiv(C, BLOCK_C)
        cols += (pid % blocks) * BLOCK_C
        pid = pid // blocks
    begin = pid.to(tl.int64) * chunk
    first_b, first_n = flat_start(begin, N)
    count = tl.minimum(total_rows - begin, chunk).to(tl.int32)
    DATA: tl.constexpr = dz_ptr is not None or dh_ptr is not None
    sum_weight = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    sum_bias = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, count, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        live = rows < count
        b, n = wrap_rows(first_b, first_n + rows, N)
        mask = live[:, None] & (cols < C)[None, :]
        moved = load_mask(row_mask_ptr, b, n, stride_m_b, stride_m_n, live)
        z = load_rows(z_ptr, row_offset(b, n, stride_z_b, stride_z_n, VEC), cols, mask)
        h_mask = mask & moved[:, None]
        h = load_rows(h_ptr, row_offset(b, n, stride_h_b, stride_h_n, VEC), cols, h_mask)
        at_dout = row_offset(b, n, stride_dout_b, stride_dout_n, VEC)
        grad = load_rows(dout_ptr, at_dout, cols, mask)
        if stats_ptr is not None:
            stats = stats_ptr + (b * N + n) * 7
            alpha = tl.load(stats, mask=live, other=0.0)
            mean = tl.load(stats + 1, mask=live, other=0.0)
            rstd = tl.load(stats + 2, mask=live, other=0.0)
            xhat = tl.where(mask, z + alpha[:, None] * h - mean[:, None], 0.0) * rstd[:, None]
        else:
            alpha, by_z, by_h = gate_alpha(tl.sum(z * z, axis=1), tl.sum(h * h, axis=1), beta)
            y = z + alpha[:, None] * h
            mean = tl.sum(y, axis=1) / C
            xhat = tl.where(mask, y - mean[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(xhat * xhat, axis=1) / C + tl.cast(eps, tl.float32))
            # eps = 0: rows past the end would be 0 * inf
            xhat = tl.where(mask, xhat * rstd[:, None], 0.0)
        if sum_weight_ptr is not None:
            sum_weight += grad * xhat
        if sum_bias_ptr is not None:
            sum_bias += grad
        if DATA:
            if weight_ptr is not None:
                grad *= load_columns(weight_ptr, cols, mask)
            if stats_ptr is not None:
                mean_g = tl.load(stats + 3, mask=live, other=0.0)
                mean_gx = tl.load(stats + 4, mask=live, other=0.0)
            else:
                mean_g = tl.sum(grad, axis=1) / C
                mean_gx = tl.sum(grad * xhat, axis=1) / C
            dy = rstd[:, None] * (grad - mean_g[:, None] - xhat * mean_gx[:, None])
            if stats_ptr is not None:
                z_factor = tl.load(stats + 5, mask=live, other=0.0)
                h_factor = tl.load(stats + 6, mask=live, other=0.0)
            else:
                pull = alpha * tl.sum(dy * h, axis=1)
                z_factor = pull * by_z * by_z
                h_factor = pull * by_h * by_h
            if dz_ptr is not None:
                at_dz = row_offset(b, n, stride_dz_b, stride_dz_n, VEC)
                store_rows(dz_ptr, at_dz, cols, dy + z_factor[:, None] * z, mask)
            if dh_ptr is not None:
                dh = alpha[:, None] * dy - h_factor[:, None] * h
                at_dh = row_offset(b, n, stride_dh_b, stride_dh_n, VEC)
                store_rows(dh_ptr, at_dh, cols, tl.where(h_mask, dh, 0.0), mask)
    out = pid.to(tl.int64) * C + cols
    if sum_weight_ptr is not None:
        tl.store(sum_weight_ptr + out, tl.sum(sum_weight, axis=0), mask=cols < C)
    if sum_bias_ptr is not None:
        tl.store(sum_bias_ptr + out, tl.sum(sum_bias, axis=0), mask=cols < C)


@triton.jit(do_not_specialize=_STATS_INTS)
def adaptation_gate_bwd_stats_kernel(
    z_ptr, dout_ptr, h_ptr, weight_ptr, row_mask_ptr, stats_ptr,
    stride_z_b, stride_z_n, stride_dout_b, stride_dout_n, stride_h_b, stride_h_n,
    stride_m_b, stride_m_n, N, C, beta, eps,
    VEC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The `_STATS` numbers of one long row, read four times."""
    C = C * VEC
    row = tl.program_id(0)
    b = row // N
    n = row % N + tl.arange(0, 1)
    moved = load_mask(row_mask_ptr, b, n, stride_m_b, stride_m_n, n < N)[:, None]
    at_z = row_offset(b, n, stride_z_b, stride_z_n, VEC)
    at_h = row_offset(b, n, stride_h_b, stride_h_n, VEC)
    at_dout = row_offset(b, n, stride_dout_b, stride_dout_n, VEC)
    alpha, by_z, by_h, mean, rstd = long_row_moments(
        z_ptr, h_ptr, at_z, at_h, moved, C, beta, eps, BLOCK_C
    )

    sum_g = tl.zeros([1, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([1, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = (cols < C)[None, :]
        z = load_rows(z_ptr, at_z, cols, mask)
        y = z + alpha[:, None] * load_rows(h_ptr, at_h, cols, mask & moved)
        grad = load_rows(dout_ptr, at_dout, cols, mask)
        if weight_ptr is not None:
            grad *= load_columns(weight_ptr, cols, mask)
        sum_g += grad
        sum_gx += grad * ((y - mean[:, None]) * rstd[:, None])
    mean_g = tl.sum(sum_g, axis=1) / C
    mean_gx = tl.sum(sum_gx, axis=1) / C

    sum_dyh = tl.zeros([1, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = (cols < C)[None, :]
        z = load_rows(z_ptr, at_z, cols, mask)
        h = load_rows(h_ptr, at_h, cols, mask & moved)
        grad = load_rows(dout_ptr, at_dout, cols, mask)
        if weight_ptr is not None:
            grad *= load_columns(weight_ptr, cols, mask)
        xhat = (z + alpha[:, None] * h - mean[:, None]) * rstd[:, None]
        sum_dyh += (grad - mean_g[:, None] - xhat * mean_gx[:, None]) * h
    pull = alpha * rstd * tl.sum(sum_dyh, axis=1)

    stats = stats_ptr + row.to(tl.int64) * 7 + tl.arange(0, 1)
    tl.store(stats, alpha)
    tl.store(stats + 1, mean)
    tl.store(stats + 2, rstd)
    tl.store(stats + 3, mean_g)
    tl.store(stats + 4, mean_gx)
    tl.store(stats + 5, pull * by_z * by_z)
    tl.store(stats + 6, pull * by_h * by_h)


def adaptation_gate_bwd(
    dout: Tensor,
    z: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_mask: Tensor | None,
    beta: float,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dz, dh, dweight, dbias`, each like its argument; `[0]` where `needs` has False.

    dout is `[B, N, C]` with last stride 1; bias is for its dtype only. Rows where row_mask is False
    get dh = 0 exactly.
    """
    none = z.new_empty(0)
    dz = empty_like_rows(z) if needs[0] else none
    dh = empty_like_rows(h) if needs[1] else none
    dweight = weight.new_empty(weight.shape) if needs[2] and weight is not None else none
    dbias = bias.new_empty(bias.shape) if needs[3] and bias is not None else none
    grads = [g if g is not none else None for g in (dz, dh, dweight, dbias)]
    if z.numel() == 0:
        dweight.zero_()
        dbias.zero_()
    elif any(g is not None for g in grads):
        _run((z, dout, h, weight, row_mask), grads, beta, eps)
    return dz, dh, dweight, dbias


def bwd_tile(C: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and its warps."""
    block = power_of_two(C) if C <= MAX_TILE_C else _SPLIT_C
    rows = max(1, _TILE // block)
    return rows, block, min(max(4, rows * block // 256), 16)


def _run(
    data: tuple[Tensor | None, ...], grads: list[Tensor | None], beta: float, eps: float
) -> None:
    z, dout, h, weight, row_mask = data
    dz, dh, *vectors = grads
    B, N, C = z.shape
    steps = strides_of(z, dout, h, dz, dh)
    vec = _launch.vector_width(smallest_itemsize(z, dout, h, weight), C, *steps)
    steps = [step // vec for step in steps]
    mask_steps = mask_strides(row_mask)
    stats = None
    if C > MAX_TILE_C:
        stats = floats(z, B * N, _STATS)
        _launch.launch(
            adaptation_gate_bwd_stats_kernel, B * N, *data, stats, *steps[:6], *mask_steps,
            N, C // vec, beta, eps, VEC=vec, BLOCK_C=_LOOP_C, num_warps=8, **OPTIONS,
        )  # fmt: skip
    rows, block, warps = bwd_tile(C)
    rows = min(rows, power_of_two(B * N))
    blocks = ceil_div(C, block)
    chunk = chunk_rows(B * N, blocks * (warps // 4), rows)
    chunks = ceil_div(B * N, chunk)
    wanted = [vector for vector in vectors if vector is not None]
    sums = wanted
    if chunks > 1:
        partials = floats(z, len(wanted), chunks, C)
        sums = list(partials)
    targets = iter(sums)
    _launch.launch(
        adaptation_gate_bwd_kernel, chunks * blocks, *data, stats, dz, dh,
        *[None if vector is None else next(targets) for vector in vectors],
        *steps[:6], *mask_steps, *steps[6:], B * N, N, C // vec, chunk, beta, eps,
        VEC=vec, BLOCK_N=rows, BLOCK_C=block, SPLIT=blocks > 1, num_warps=warps, **OPTIONS,
    )  # fmt: skip
    if wanted and chunks > 1:
        sum_chunks(partials, wanted, chunks)
