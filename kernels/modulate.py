"""`modulate` in Triton: norm, scale and shift of a (gated) residual sum in one pass.

    h   = x, or residual + gate * x, rounded to the storage dtype
    out = (norm(h) * weight + bias) * (1 + scale) + shift

Data is `[B, N, C]` with last stride 1; scale, shift and gate are `[B|1, N|1, C]`, weight and bias
`[C]`. A program holds a tile of rows in registers up to `MAX_TILE_C` columns and reads longer rows
twice. Arithmetic is fp32. The backward is in `modulate_bwd.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mmfast.kernels import _launch
from mmfast.kernels._launch import ceil_div, empty_like_rows, power_of_two
from mmfast.kernels._rows import (
    flat_start,
    load_columns,
    load_rows,
    merge_moments,
    row_offset,
    smallest_itemsize,
    store_rows,
    strides_of,
    wrap_rows,
)
from mmfast.kernels._tuning import OPTIONS
from torch import Tensor

NONE = 0
MAX_TILE_C = 16384  # wider rows are read in blocks
_LOOP_C = 4096
_FILM_C = 2048  # without a norm a row may be cut anywhere
_TILE = 2048  # elements of a tile of short rows: 16 a thread with 4 warps

_INTS = [f"stride_{name}_{dim}" for name in "xrgstoh" for dim in "bn"] + ["total_rows", "N", "C"]


@triton.jit
def _stream(
    x_ptr, residual_ptr, gate_ptr, h_ptr,
    b, n, stride_x_b, stride_x_n, stride_r_b, stride_r_n, stride_g_b, stride_g_n,
    stride_h_b, stride_h_n, cols, mask, VEC: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """A tile of h in fp32, rounded as it is stored; `STORE` writes it."""
    h = load_rows(x_ptr, row_offset(b, n, stride_x_b, stride_x_n, VEC), cols, mask)
    if residual_ptr is not None:
        if gate_ptr is not None:
            h *= load_rows(gate_ptr, row_offset(b, n, stride_g_b, stride_g_n, VEC), cols, mask)
        h += load_rows(residual_ptr, row_offset(b, n, stride_r_b, stride_r_n, VEC), cols, mask)
        rounded = h.to(x_ptr.dtype.element_ty)
        if STORE:
            store_rows(h_ptr, row_offset(b, n, stride_h_b, stride_h_n, VEC), cols, rounded, mask)
        h = rounded.to(tl.float32)
    return h


@triton.jit
def _modulated(
    u, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    b, n, stride_s_b, stride_s_n, stride_t_b, stride_t_n, cols, mask, VEC: tl.constexpr,
):  # fmt: skip
    """`(u * weight + bias) * (1 + scale) + shift`."""
    if weight_ptr is not None:
        u *= load_columns(weight_ptr, cols, mask)
    if bias_ptr is not None:
        u += load_columns(bias_ptr, cols, mask)
    if scale_ptr is not None:
        u *= 1.0 + load_rows(scale_ptr, row_offset(b, n, stride_s_b, stride_s_n, VEC), cols, mask)
    if shift_ptr is not None:
        u += load_rows(shift_ptr, row_offset(b, n, stride_t_b, stride_t_n, VEC), cols, mask)
    return u


@triton.jit(do_not_specialize=_INTS)
def modulate_fwd_kernel(
    x_ptr, residual_ptr, gate_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr, out_ptr, h_ptr,
    stride_x_b, stride_x_n, stride_r_b, stride_r_n, stride_g_b, stride_g_n,
    stride_s_b, stride_s_n, stride_t_b, stride_t_n, stride_o_b, stride_o_n,
    stride_h_b, stride_h_n, total_rows, N, C, eps,
    VEC: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of rows, counted over all items; `SPLIT`: one block of its columns (no norm)."""
    C = C * VEC
    tile = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    if SPLIT:
        blocks = tl.cdiv(C, BLOCK_C)
        cols += (tile % blocks) * BLOCK_C
        tile = tile // blocks
    first = tile.to(tl.int64) * BLOCK_N
    b, n = flat_start(first, N)
    b, n = wrap_rows(b, n + tl.arange(0, BLOCK_N), N)
    live = first + tl.arange(0, BLOCK_N) < total_rows
    mask = live[:, None] & (cols < C)[None, :]
    h = _stream(
        x_ptr, residual_ptr, gate_ptr, h_ptr, b, n, stride_x_b, stride_x_n, stride_r_b, stride_r_n,
        stride_g_b, stride_g_n, stride_h_b, stride_h_n, cols, mask, VEC, True,
    )  # fmt: skip
    u = h
    if NORM == 1:
        mean = tl.sum(h, axis=1) / C
        u = tl.where(mask, h - mean[:, None], 0.0)
    if NORM != 0:
        u *= tl.rsqrt(tl.sum(u * u, axis=1) / C + tl.cast(eps, tl.float32))[:, None]
    u = _modulated(
        u, weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, n, stride_s_b, stride_s_n,
        stride_t_b, stride_t_n, cols, mask, VEC,
    )  # fmt: skip
    store_rows(out_ptr, row_offset(b, n, stride_o_b, stride_o_n, VEC), cols, u, mask)


@triton.jit(do_not_specialize=[*_INTS[:-3], "N", "C"])
def modulate_fwd_loop_kernel(
    x_ptr, residual_ptr, gate_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr, out_ptr, h_ptr,
    stride_x_b, stride_x_n, stride_r_b, stride_r_n, stride_g_b, stride_g_n,
    stride_s_b, stride_s_n, stride_t_b, stride_t_n, stride_o_b, stride_o_n,
    stride_h_b, stride_h_n, N, C, eps,
    VEC: tl.constexpr, NORM: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row in blocks: its moments and h first, then the result; the second read is from L2."""
    C = C * VEC
    b = tl.program_id(0) // N
    n = tl.program_id(0) % N + tl.arange(0, 1)
    mean = tl.zeros([1], tl.float32)
    m2 = tl.zeros([1], tl.float32)
    count = 0.0
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = (cols < C)[None, :]
        h = _stream(
            x_ptr, residual_ptr, gate_ptr, h_ptr, b, n, stride_x_b, stride_x_n, stride_r_b,
            stride_r_n, stride_g_b, stride_g_n, stride_h_b, stride_h_n, cols, mask,
            VEC, True,
        )  # fmt: skip
        if NORM == 1:
            width = tl.minimum(C - start, BLOCK_C).to(tl.float32)
            mean, m2, count = merge_moments(mean, m2, count, h, mask, width)
        else:
            m2 += tl.sum(h * h, axis=1)
    rstd = tl.rsqrt(m2 / C + tl.cast(eps, tl.float32))
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = (cols < C)[None, :]
        h = _stream(
            x_ptr, residual_ptr, gate_ptr, h_ptr, b, n, stride_x_b, stride_x_n, stride_r_b,
            stride_r_n, stride_g_b, stride_g_n, stride_h_b, stride_h_n, cols, mask,
            VEC, False,
        )  # fmt: skip
        u = _modulated(
            (h - mean[:, None]) * rstd[:, None], weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, n,
            stride_s_b, stride_s_n, stride_t_b, stride_t_n, cols, mask, VEC,
        )  # fmt: skip
        store_rows(out_ptr, row_offset(b, n, stride_o_b, stride_o_n, VEC), cols, u, mask)


def modulate_fwd(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`(out, h)`, both in x's layout and dtype; h is `[0]` without a residual.

    Args:
        x, residual: `[B, N, C]`, last stride 1.
        gate, scale, shift: `[B|1, N|1, C]`, last stride 1; gate counts with a residual only.
        weight, bias: `[C]`.
        norm: 0 none, 1 layer, 2 rms.
    """
    out = empty_like_rows(x)
    h = empty_like_rows(x) if residual is not None else None
    if x.numel() > 0:
        _run((x, residual, gate, scale, shift, weight, bias, out, h), norm, eps)
    return out, x.new_empty(0) if h is None else h


def fwd_tile(C: int, norm: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and its warps."""
    block = power_of_two(C)
    if norm == NONE:
        block = min(block, _FILM_C)
    rows = max(1, _TILE // block)
    return rows, block, min(max(4, rows * block // 512), 16)


def _run(tensors: tuple[Tensor | None, ...], norm: int, eps: float) -> None:
    x, residual, gate, scale, shift, _, _, out, h = tensors
    B, N, C = x.shape
    steps = strides_of(x, residual, gate, scale, shift, out, h)
    vec = _launch.vector_width(smallest_itemsize(*tensors), C, *steps)
    steps = [step // vec for step in steps]
    if norm != NONE and C > MAX_TILE_C:
        _launch.launch(
            modulate_fwd_loop_kernel, B * N, *tensors, *steps, N, C // vec, eps,
            VEC=vec, NORM=norm, BLOCK_C=_LOOP_C, num_warps=8, **OPTIONS,
        )  # fmt: skip
        return
    rows, block, warps = fwd_tile(C, norm)
    blocks = ceil_div(C, block)
    _launch.launch(
        modulate_fwd_kernel, ceil_div(B * N, rows) * blocks, *tensors, *steps,
        B * N, N, C // vec, eps,
        VEC=vec, NORM=norm, BLOCK_N=rows, BLOCK_C=block, SPLIT=blocks > 1, num_warps=warps,
        **OPTIONS,
    )  # fmt: skip
