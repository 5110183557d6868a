"""`adaptation_gate` (MAG, Rahman et al. 2020) in Triton: one pass over the data.

    alpha = min(beta * |z| / |h|, 1) per row, 1 where |h| = 0
    out   = layer_norm(z + alpha * h) * weight + bias

z and h are `[B, N, C]` with last stride 1, weight and bias `[C]`, row_mask `[B|1, N|1]` bool: where
it is False nothing of h is read and out = layer_norm(z) * weight + bias. A program holds a tile of
rows in registers up to `MAX_TILE_C` columns and reads longer rows three times. Arithmetic is fp32.
The backward is in `adaptation_gate_bwd.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mmfast.kernels import _launch
from mmfast.kernels._launch import ceil_div, empty_like_rows, power_of_two
from mmfast.kernels._rows import (
    flat_start,
    load_columns,
    load_mask,
    load_rows,
    mask_strides,
    merge_moments,
    row_offset,
    smallest_itemsize,
    store_rows,
    strides_of,
    wrap_rows,
)
from mmfast.kernels._tuning import OPTIONS
from torch import Tensor

MAX_TILE_C = 16384
_LOOP_C = 4096
_TILE = 2048  # elements of a tile of short rows: 16 a thread with 4 warps

_INTS = [
    *(f"stride_{name}_{dim}" for name in "zhmo" for dim in "bn"),
    "rows",
    "N",
    "C",
]


@triton.jit
def gate_alpha(square_z, square_h, beta):
    """alpha, 1/|z| and 1/|h| of rows from their squared norms.

    The reciprocals are 0 where alpha does not depend on that norm. They are not squared here: the
    square of a small norm's would overflow.
    """
    norm_z = tl.sqrt_rn(square_z)
    norm_h = tl.sqrt_rn(square_h)
    some = square_h > 0
    ratio = tl.cast(beta, tl.float32) * norm_z / tl.where(some, norm_h, 1.0)
    follows = some & (ratio < 1)
    alpha = tl.where(follows, ratio, 1.0)
    by_h = tl.where(follows, 1.0 / tl.where(some, norm_h, 1.0), 0.0)
    by_z = tl.where(follows & (norm_z > 0), 1.0 / tl.where(norm_z > 0, norm_z, 1.0), 0.0)
    return alpha, by_z, by_h


@triton.jit
def long_row_moments(z_ptr, h_ptr, at_z, at_h, moved, C, beta, eps, BLOCK_C: tl.constexpr):
    """`gate_alpha` of one row, and the mean and 1/deviation of z + alpha * h; reads it twice."""
    sum_z = tl.zeros([1, BLOCK_C], tl.float32)
    sum_h = tl.zeros([1, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = (cols < C)[None, :]
        z = load_rows(z_ptr, at_z, cols, mask)
        h = load_rows(h_ptr, at_h, cols, mask & moved)
        sum_z += z * z
        sum_h += h * h
    alpha, by_z, by_h = gate_alpha(tl.sum(sum_z, axis=1), tl.sum(sum_h, axis=1), beta)
    mean = tl.zeros([1], tl.float32)
    m2 = tl.zeros([1], tl.float32)
    count = 0.0
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = (cols < C)[None, :]
        z = load_rows(z_ptr, at_z, cols, mask)
        y = z + alpha[:, None] * load_rows(h_ptr, at_h, cols, mask & moved)
        width = tl.minimum(C - start, BLOCK_C).to(tl.float32)
        mean, m2, count = merge_moments(mean, m2, count, y, mask, width)
    rstd = tl.rsqrt(m2 / C + tl.cast(eps, tl.float32))
    return alpha, by_z, by_h, mean, rstd


@triton.jit
def _affine(u, weight_ptr, bias_ptr, cols, mask):
    if weight_ptr is not None:
        u *= load_columns(weight_ptr, cols, mask)
    if bias_ptr is not None:
        u += load_columns(bias_ptr, cols, mask)
    return u


@triton.jit(do_not_specialize=_INTS)
def adaptation_gate_fwd_kernel(
    z_ptr, h_ptr, weight_ptr, bias_ptr, row_mask_ptr, out_ptr,
    stride_z_b, stride_z_n, stride_h_b, stride_h_n, stride_m_b, stride_m_n,
    stride_o_b, stride_o_n, rows, N, C, beta, eps,
    VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of rows, counted over all items."""
    C = C * VEC
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    b, n = flat_start(first, N)
    b, n = wrap_rows(b, n + tl.arange(0, BLOCK_N), N)
    live = first + tl.arange(0, BLOCK_N) < rows
    cols = tl.arange(0, BLOCK_C)
    mask = live[:, None] & (cols < C)[None, :]
    moved = load_mask(row_mask_ptr, b, n, stride_m_b, stride_m_n, live)
    z = load_rows(z_ptr, row_offset(b, n, stride_z_b, stride_z_n, VEC), cols, mask)
    h_mask = mask & moved[:, None]
    h = load_rows(h_ptr, row_offset(b, n, stride_h_b, stride_h_n, VEC), cols, h_mask)
    alpha, _, _ = gate_alpha(tl.sum(z * z, axis=1), tl.sum(h * h, axis=1), beta)
    y = z + alpha[:, None] * h
    mean = tl.sum(y, axis=1) / C
    y = tl.where(mask, y - mean[:, None], 0.0)
    y *= tl.rsqrt(tl.sum(y * y, axis=1) / C + tl.cast(eps, tl.float32))[:, None]
    y = _affine(y, weight_ptr, bias_ptr, cols, mask)
    store_rows(out_ptr, row_offset(b, n, stride_o_b, stride_o_n, VEC), cols, y, mask)


@triton.jit(do_not_specialize=[name for name in _INTS if name != "rows"])
def adaptation_gate_fwd_loop_kernel(
    z_ptr, h_ptr, weight_ptr, bias_ptr, row_mask_ptr, out_ptr,
    stride_z_b, stride_z_n, stride_h_b, stride_h_n, stride_m_b, stride_m_n,
    stride_o_b, stride_o_n, N, C, beta, eps,
    VEC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row in blocks: its norms, then its moments, then the result; L2 holds it meanwhile."""
    C = C * VEC
    b = tl.program_id(0) // N
    n = tl.program_id(0) % N + tl.arange(0, 1)
    moved = load_mask(row_mask_ptr, b, n, stride_m_b, stride_m_n, n < N)[:, None]
    at_z = row_offset(b, n, stride_z_b, stride_z_n, VEC)
    at_h = row_offset(b, n, stride_h_b, stride_h_n, VEC)
    alpha, _, _, mean, rstd = long_row_moments(
        z_ptr, h_ptr, at_z, at_h, moved, C, beta, eps, BLOCK_C
    )
    at_out = row_offset(b, n, stride_o_b, stride_o_n, VEC)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = (cols < C)[None, :]
        z = load_rows(z_ptr, at_z, cols, mask)
        y = z + alpha[:, None] * load_rows(h_ptr, at_h, cols, mask & moved)
        y = _affine((y - mean[:, None]) * rstd[:, None], weight_ptr, bias_ptr, cols, mask)
        store_rows(out_ptr, at_out, cols, y, mask)


def adaptation_gate_fwd(
    z: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_mask: Tensor | None,
    beta: float,
    eps: float,
) -> Tensor:
    """The result, in z's layout and dtype; the arguments are those of this module's docstring."""
    out = empty_like_rows(z)
    if z.numel() == 0:
        return out
    B, N, C = z.shape
    tensors = (z, h, weight, bias, row_mask, out)
    steps = strides_of(z, h, out)
    vec = _launch.vector_width(smallest_itemsize(z, h, weight, bias), C, *steps)
    steps = [step // vec for step in steps]
    steps = [*steps[:4], *mask_strides(row_mask), *steps[4:]]
    if C > MAX_TILE_C:
        _launch.launch(
            adaptation_gate_fwd_loop_kernel, B * N, *tensors, *steps, N, C // vec, beta, eps,
            VEC=vec, BLOCK_C=_LOOP_C, num_warps=8, **OPTIONS,
        )  # fmt: skip
        return out
    rows, block, warps = fwd_tile(C)
    _launch.launch(
        adaptation_gate_fwd_kernel, ceil_div(B * N, rows), *tensors, *steps,
        B * N, N, C // vec, beta, eps,
        VEC=vec, BLOCK_N=rows, BLOCK_C=block, num_warps=warps, **OPTIONS,
    )  # fmt: skip
    return out


def fwd_tile(C: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and its warps."""
    block = power_of_two(C)
    rows = max(1, _TILE // block)
    return rows, block, min(max(4, rows * block // 512), 16)
