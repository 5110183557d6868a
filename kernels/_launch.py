"""Between torch and the kernels: how rows are numbered, how wide memory is accessed, the launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mmfast.kernels._compiled import run as _run
from torch import Tensor

MAX_PROGRAMS = 2**31 - 1
ACCESS_BYTES = 16  # the widest access of a thread


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """`kernel[(programs,)](*args, **constants)` on the device of the first argument, a tensor.

    Nothing waits for the device. No program, no launch. The grid has one dim, whose limit is 2^31.
    Constants are hashable; run-time arguments are passed by position.
    """
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"{programs} programs, a grid holds {MAX_PROGRAMS}: the tensor is too large"
        )
    if programs > 0:
        _run(kernel, programs, args, constants)


def empty_like_rows(tensor: Tensor, columns: int | None = None) -> Tensor:
    """An uninitialised `[B, N, columns]` (C of `tensor` when not given) for a result beside it.

    Its memory is `[N, B, C]` when that of `tensor` is, otherwise contiguous.
    """
    B, N, C = tensor.shape
    if columns is not None:
        C = columns
    if B > 1 and N > 1 and tensor.stride(0) < tensor.stride(1):
        return tensor.new_empty((N, B, C)).transpose(0, 1)
    return tensor.new_empty((B, N, C))


def row_strides(tensor: Tensor) -> tuple[int, int]:
    """Strides of dims 0 and 1, 0 where the size is 1: such a dim broadcasts."""
    return (
        tensor.stride(0) if tensor.shape[0] > 1 else 0,
        tensor.stride(1) if tensor.shape[1] > 1 else 0,
    )


Strides = Sequence[tuple[int, int]]


def fold(B: int, N: int, strides: Strides) -> tuple[int, int, Strides]:
    """The same rows as B' x N' with B' small: 1 where all tensors allow it, never more than N'.

    `strides` holds the row strides of each tensor. For kernels that do not care which row is which.
    """
    if N == 1:
        return 1, B, [(0, b) for b, _ in strides]
    if B == 1:
        return B, N, strides
    if all(b == N * n for b, n in strides):
        return 1, B * N, [(0, n) for _, n in strides]
    if all(n == B * b for b, n in strides):
        return 1, B * N, [(0, b) for b, _ in strides]
    if B > N:
        return N, B, [(n, b) for b, n in strides]
    return B, N, strides


def vector_width(itemsize: int, *multiples: int) -> int:
    """Elements of an access: the largest power of two up to 16 bytes that divides all `multiples`.

    Kernels take C and strides divided by it and multiply in the kernel, where the compiler sees the
    divisor: wide accesses wherever they are true, and no new kernel for each shape.
    """
    bits = 0
    for multiple in multiples:
        bits |= multiple
    widest = ACCESS_BYTES // itemsize
    return min(bits & -bits, widest) if bits else widest


def unspecialised(strides: Strides) -> tuple[tuple[int, int], ...]:
    """Strides for a tuple parameter, where their number is open; `_blocks.stride_pair` undoes it.

    Triton compiles anew for an int in a tuple that is 1 or a multiple of 16, whatever the kernel
    asks for. 4 s + 2 is neither, and one shift gives s back.
    """
    return tuple([(4 * b + 2, 4 * n + 2) for b, n in strides])


class Layout(NamedTuple):
    """Rows and strides as a kernel over tiles takes them.

    `C` and the strides in `wide` are in units of `vec` elements; those in `narrow` are plain.
    """

    B: int
    N: int
    C: int
    vec: int
    wide: tuple[tuple[int, int], ...]
    narrow: tuple[tuple[int, int], ...]

    @property
    def columns(self) -> int:
        """C in elements."""
        return self.C * self.vec


def layout(
    shape: tuple[int, int, int],
    itemsize: int,
    wide: Strides,
    narrow: Strides = (),
    *,
    free: bool = True,
    multiples: Sequence[int] = (),
) -> Layout:
    """How to walk over `[B, N, C]` tensors together.

    wide: row strides of tensors whose last dim is dense. narrow: row strides of what has one value
    a row. free: rows may be merged or swapped, and all be one row where every tensor is one dense
    block; without it B and N stay what they are. multiples: other strides that `vec` has to divide.
    """
    B, N, C = shape
    if free:
        B, N, folded = fold(B, N, [*wide, *narrow])
        wide, narrow = folded[: len(wide)], folded[len(wide) :]
        if B == 1 and all(n == C for _, n in wide) and not any(n for _, n in narrow):
            N, C = 1, N * C
    steps = [step * (size > 1) for strides in wide for step, size in zip(strides, (B, N))]
    vec = vector_width(itemsize, C, *steps, *multiples)
    return Layout(
        B,
        N,
        C // vec,
        vec,
        tuple(zip([step // vec for step in steps[::2]], [step // vec for step in steps[1::2]])),
        tuple(narrow),
    )


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
