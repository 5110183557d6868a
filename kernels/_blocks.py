"""Pieces that the kernels share: activations in float32, sums of partial sums in fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from mmfast.kernels._launch import ceil_div, launch, power_of_two
from mmfast.kernels._tuning import OPTIONS
from torch import Tensor

# --- activations: float32 in, float32 out --------------------------------------------------------


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); 0 and 1 at the infinities."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh(x), relative accuracy near 0 as well.

    By the exponential, except where that would cancel: there the polynomial of Cephes' tanhf
    (Moshier), right to 2 ulp for |x| < 0.625.
    """
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    near = p * square * x + x
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def gate_activation(x, ACTIVATION: tl.constexpr):
    """0 tanh, 1 sigmoid, 2 identity: the order of `reference.activations.GATE_ACTIVATIONS`."""
    if ACTIVATION == 0:
        value = tanh(x)
    elif ACTIVATION == 1:
        value = sigmoid(x)
    else:
        value = x
    return value


@triton.jit
def gate_gradient(x, ACTIVATION: tl.constexpr):
    """(activation, derivative) of `gate_activation`."""
    if ACTIVATION == 0:
        value = tanh(x)
        slope = 1.0 - value * value
    elif ACTIVATION == 1:
        value = sigmoid(x)
        slope = value * (1.0 - value)
    else:
        value = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def glu_activation(x, ACTIVATION: tl.constexpr):
    """0 silu, 1 gelu (erf), 2 gelu_tanh, 3 relu, 4 sigmoid, 5 identity.

    The order of `reference.activations.GLU_ACTIVATIONS`.
    """
    if ACTIVATION == 0:
        value = x * sigmoid(x)
    elif ACTIVATION == 1:
        value = x * _normal_cdf(x)
    elif ACTIVATION == 2:
        # 0.5 x (1 + tanh(u)) = x sigmoid(2 u), which does not cancel for negative x.
        value = x * sigmoid(x * (1.5957691216 + 0.07135481283 * x * x))
    elif ACTIVATION == 3:
        value = tl.where(x <= 0, 0.0, x)  # NaN stays NaN
    elif ACTIVATION == 4:
        value = sigmoid(x)
    else:
        value = x
    return value


@triton.jit
def glu_gradient(x, ACTIVATION: tl.constexpr):
    """(activation, derivative) of `glu_activation`."""
    if ACTIVATION == 0:
        s = sigmoid(x)
        value = x * s
        slope = s + value * (1.0 - s)
    elif ACTIVATION == 1:
        cdf = _normal_cdf(x)
        value = x * cdf
        slope = cdf + x * 0.3989422804 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == 2:
        s = sigmoid(x * (1.5957691216 + 0.07135481283 * x * x))
        value = x * s
        slope = s + value * (1.0 - s) * (1.5957691216 + 0.2140644385 * x * x)
    elif ACTIVATION == 3:
        value = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == 4:
        value = sigmoid(x)
        slope = value * (1.0 - value)
    else:
        value = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


# --- tiles ----------------------------------------------------------------------------------------


@triton.jit
def first_tile(tiles_n, tiles_c, ROWS, BLOCK_C: tl.constexpr):
    """(b, n, c) of this program: item, first row, and its columns `[1, BLOCK_C]`, in 64 bits.

    The grid runs over column tiles, then over tiles of ROWS rows, then over items.
    """
    pid = tl.program_id(0)
    c = (pid % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    rows = pid // tiles_c
    n = (rows % tiles_n).to(tl.int64) * ROWS
    return (rows // tiles_n).to(tl.int64), n, c


@triton.jit
def row_offset(strides, b, n, UNIT: tl.constexpr):
    """Offset in elements of rows whose strides are given in units of UNIT elements."""
    return (b * strides[0] + n * strides[1]) * UNIT


@triton.jit
def stride_pair(coded):
    """What `_launch.unspecialised` made of a pair of strides, as it was."""
    return coded[0] >> 2, coded[1] >> 2


@triton.jit
def load_rows(ptr, strides, b, n, c, mask, VEC: tl.constexpr):
    """A tile in float32, 0 where the mask is False."""
    offset = row_offset(strides, b, n, VEC) + c
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, strides, b, n, c, value, mask, VEC: tl.constexpr):
    """Rounds a tile to the pointer's dtype and writes it."""
    offset = row_offset(strides, b, n, VEC) + c
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_side(
    ptr, strides, b, n, c, N, columns,
    VEC: tl.constexpr, PER_ROW: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """A gate or logit as `[BLOCK_N or 1, BLOCK_C or 1]`, in float32.

    Its strides are in units of VEC elements when it has channels, plain otherwise.
    """
    UNIT: tl.constexpr = VEC if PER_CHANNEL else 1
    if PER_ROW:
        offset = row_offset(strides, b, n, UNIT)
        mask = n < N
    else:
        offset = row_offset(strides, b, tl.zeros([1, 1], tl.int64), UNIT)
        mask = tl.full([1, 1], True, tl.int1)
    if PER_CHANNEL:
        offset += c
        mask = mask & (c < columns)
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_flags(ptr, strides, b, n, N):
    """A bool of each row, `[BLOCK_N, 1]`, False past the last row."""
    return tl.load(ptr + row_offset(strides, b, n, 1), mask=n < N, other=0) != 0


# --- partial sums ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["P", "group", "C"])
def column_sums_kernel(
    partials_ptr, out_ptrs, P, group, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out[s][g, c] = sum of partials[s, p, c] over p of group g."""
    pid = tl.program_id(0)
    tiles = (C + BLOCK_C - 1) // BLOCK_C
    g = (pid // tiles).to(tl.int64)
    c = (pid % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    first = g * group
    last = tl.minimum(first + group, P)
    for s in tl.static_range(len(out_ptrs)):
        if out_ptrs[s] is not None:
            total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for start in range(first, last, BLOCK_P):
                p = start + tl.arange(0, BLOCK_P)[:, None]
                total += tl.load(
                    partials_ptr + (s * P.to(tl.int64) + p) * C + c,
                    mask=(p < last) & (c < C),
                    other=0.0,
                )
            result = tl.sum(total, axis=0, keep_dims=True)
            tl.store(out_ptrs[s] + g * C + c, result.to(out_ptrs[s].dtype.element_ty), mask=c < C)


def column_sums(partials: Tensor, outs: Sequence[Tensor | None], group: int) -> None:
    """Sums of partial sums, in an order that depends on shapes alone, rounded once.

    partials: `[S, P, C]` float32, contiguous. outs: S tensors, each contiguous with `G * C`
    elements, its own dtype; None is skipped. Row g of out s is the sum of partials s, rows
    `g * group` to `min((g + 1) * group, P)`.
    """
    _, P, C = partials.shape
    columns = min(32, power_of_two(C))
    rows = min(2048 // columns, power_of_two(min(group, P)))
    programs = ceil_div(P, group) * ceil_div(C, columns)
    launch(
        column_sums_kernel,
        programs,
        partials,
        tuple(outs),
        P,
        group,
        C,
        BLOCK_P=rows,
        BLOCK_C=columns,
        num_warps=4,
        **OPTIONS,
    )
