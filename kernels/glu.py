"""Gated linear units: `act(a) * b`, forward and backward, one pass over memory each.

The halves of a packed tensor are read where they are: `glu_packed` is the same kernel on two views.
"""

from __future__ import annotations

from itertools import chain

import triton
import triton.language as tl
from mmfast.kernels import _tuning
from mmfast.kernels._blocks import first_tile, glu_activation, glu_gradient, load_rows, store_rows
from mmfast.kernels._launch import ceil_div, empty_like_rows, launch, layout, row_strides
from torch import Tensor

_INTEGERS = [
    *(f"{name}_{dim}" for name in ("out", "a", "b", "da", "db", "dout") for dim in "bn"),
    "N", "C", "tiles_n", "tiles_c",
]  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def glu_fwd_kernel(
    out_ptr, a_ptr, b_ptr, out_b, out_n, a_b, a_n, b_b, b_n, N, C, tiles_n, tiles_c,
    ACTIVATION: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile."""
    item, n, c = first_tile(tiles_n, tiles_c, BLOCK_N, BLOCK_C)
    n += tl.arange(0, BLOCK_N)[:, None]
    mask = (n < N) & (c < C.to(tl.int64) * VEC)
    a = load_rows(a_ptr, (a_b, a_n), item, n, c, mask, VEC)
    b = load_rows(b_ptr, (b_b, b_n), item, n, c, mask, VEC)
    out = glu_activation(a, ACTIVATION) * b
    store_rows(out_ptr, (out_b, out_n), item, n, c, out, mask, VEC)


@triton.jit(do_not_specialize=_INTEGERS)
def glu_bwd_kernel(
    da_ptr, db_ptr, dout_ptr, a_ptr, b_ptr,
    da_b, da_n, db_b, db_n, dout_b, dout_n, a_b, a_n, b_b, b_n, N, C, tiles_n, tiles_c,
    ACTIVATION: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile."""
    item, n, c = first_tile(tiles_n, tiles_c, BLOCK_N, BLOCK_C)
    n += tl.arange(0, BLOCK_N)[:, None]
    mask = (n < N) & (c < C.to(tl.int64) * VEC)
    dout = load_rows(dout_ptr, (dout_b, dout_n), item, n, c, mask, VEC)
    a = load_rows(a_ptr, (a_b, a_n), item, n, c, mask, VEC)
    b = load_rows(b_ptr, (b_b, b_n), item, n, c, mask, VEC)
    value, slope = glu_gradient(a, ACTIVATION)
    store_rows(da_ptr, (da_b, da_n), item, n, c, dout * b * slope, mask, VEC)
    store_rows(db_ptr, (db_b, db_n), item, n, c, dout * value, mask, VEC)


def _launch(kernel: triton.JITFunction, tensors: tuple[Tensor, ...], activation: int) -> None:
    """One elementwise pass over tensors of one shape."""
    rows = layout(tensors[0].shape, tensors[0].itemsize, [row_strides(t) for t in tensors])
    tile = _tuning.tile(rows.columns, tensors[0].itemsize)
    tiles_n, tiles_c = ceil_div(rows.N, tile.rows), ceil_div(rows.columns, tile.columns)
    launch(
        kernel,
        rows.B * tiles_n * tiles_c,
        *tensors,
        *chain.from_iterable(rows.wide),
        rows.N,
        rows.C,
        tiles_n,
        tiles_c,
        ACTIVATION=activation,
        VEC=rows.vec,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        num_warps=tile.warps,
        **_tuning.OPTIONS,
    )


def glu_fwd(a: Tensor, b: Tensor, activation: int) -> Tensor:
    """`act(a) * b` of `[B, N, C]` tensors."""
    out = empty_like_rows(a)
    if out.numel():
        _launch(glu_fwd_kernel, (out, a, b), activation)
    return out


def glu_bwd(dout: Tensor, a: Tensor, b: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    """The gradients of a and b."""
    da, db = empty_like_rows(a), empty_like_rows(b)
    if da.numel():
        _launch(glu_bwd_kernel, (da, db, dout, a, b), activation)
    return da, db


def glu_packed_fwd(ab: Tensor, activation: int) -> Tensor:
    """`glu_fwd` of the halves of `[B, N, 2 C]`."""
    C = ab.shape[2] // 2
    out = empty_like_rows(ab, C)
    if out.numel():
        _launch(glu_fwd_kernel, (out, ab[..., :C], ab[..., C:]), activation)
    return out


def glu_packed_bwd(dout: Tensor, ab: Tensor, activation: int) -> Tensor:
    """The gradient of ab."""
    C = ab.shape[2] // 2
    dab = empty_like_rows(ab)
    if dab.numel():
        halves = (dab[..., :C], dab[..., C:], dout, ab[..., :C], ab[..., C:])
        _launch(glu_bwd_kernel, halves, activation)
    return dab
