"""What a packed tensor holds besides its items: rows before the first, after the last, between.

A packed tensor has the rows of all items one after the other, item b from row `starts[b]` on. Its
kernels write the rows of the items and no others, so that no program writes to another's item; the
rest of a result becomes 0 here.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mmfast.kernels._attention import length
from mmfast.kernels._launch import launch
from mmfast.kernels._tuning import OPTIONS
from torch import Tensor

PARTS = 8  # programs of a gap
BLOCK = 1024


@triton.jit(do_not_specialize=["B", "longest", "rows", "heads", "width", "stride_h", "stride_n"])
def clear_outside_kernel(
    ptr, starts, lens, B, longest, rows, heads, width, stride_h, stride_n,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: every PARTS-th row of what lies between items b - 1 and b, mostly nothing."""
    pid = tl.program_id(0)
    b = pid // PARTS
    low = b * 0
    if b > 0:
        low = tl.load(starts + b - 1) + length(lens, b - 1, longest)
    high = rows
    if b < B:
        high = tl.load(starts + b)
    for row in tl.range(low + pid % PARTS, high, PARTS):
        for first in tl.range(0, heads * width, BLOCK):
            i = first + tl.arange(0, BLOCK)
            at = (i // width).to(tl.int64) * stride_h + stride_n.to(tl.int64) * row + i % width
            tl.store(ptr + at, tl.zeros([BLOCK], ptr.dtype.element_ty), mask=i < heads * width)


def clear_outside(tensor: Tensor, starts: Tensor | None, lens: Tensor | None, longest: int) -> None:
    """Zeros in the rows of a packed `[1, H, T, D]` that are no item's; nothing without `starts`.

    lens: int32 `[B]`, of which no more than `longest` rows count.
    """
    if starts is None or tensor.numel() == 0:
        return
    _, heads, rows, width = tensor.shape
    launch(
        clear_outside_kernel, starts.numel() * PARTS, tensor, starts, lens, starts.numel() - 1,
        longest, rows, heads, width, tensor.stride(1), tensor.stride(2),
        PARTS=PARTS, BLOCK=BLOCK, num_warps=4, **OPTIONS,
    )  # fmt: skip
