"""What the interpreter gets otherwise than a GPU: products on tensor cores, and bfloat16.

`with tensor_cores():` makes products as NVIDIA's tensor cores do where Triton uses them: operands
of 11 bits for "tf32", three such products for "tf32x3", products exact, and sums that are cut off
rather than rounded. Their inside is not documented; this is the least exact of what was measured of
them (Fasi, Higham, Mikaitis, Pranesh 2021, "Numerical behavior of NVIDIA tensor cores", V100): of
blocks of four products and the sum before them, each term is cut off at the last bit of float32 of
the largest, and so is their sum.

`with bfloat16_arithmetic():` makes bfloat16 right, which the interpreter keeps as raw bits:
conversions round to the nearest, ties to even; products, arithmetic and comparisons are of values.
Reductions and fused multiply-adds of bfloat16 itself stay wrong; kernels do both in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from triton_helpers import _patched, interpreted  # noqa: F401

from mmfast import dispatch

BLOCK = 4
_TF32 = np.uint32(0xFFFFE000)  # sign, exponent and 10 bits of the mantissa


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """What the tensor core reads of a float32: the lower 13 bits are left out."""
    return (np.ascontiguousarray(x).view(np.uint32) & _TF32).view(np.float32)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32.f32: to the nearest, ties away from zero."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & _TF32).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def _cut_to_float32(x: np.ndarray) -> np.ndarray:
    """float64 to float32, towards zero."""
    near = x.astype(np.float32)
    return np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near)


def mma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """`a @ b + c` as above; a and b hold values whose products are exact in float64."""
    total = c.astype(np.float32)
    for start in range(0, a.shape[1], BLOCK):
        left = a[:, start : start + BLOCK].astype(np.float64)
        right = b[start : start + BLOCK].astype(np.float64)
        terms = left.T[:, :, None] * right[:, None, :]
        terms = np.concatenate([terms, total.astype(np.float64)[None]])
        _, exponent = np.frexp(np.abs(terms).max(0))
        last_bit = np.ldexp(1.0, exponent - 24)
        total = _cut_to_float32((np.trunc(terms / last_bit) * last_bit).sum(0))
    return total


def tf32_product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Triton's `input_precision="tf32"`: the operands are passed on as they are."""
    return mma(cut_to_tf32(a), cut_to_tf32(b), c)


def tf32x3_product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Triton's `input_precision="tf32x3"`: its pass F32DotTC."""
    big_a, big_b = round_to_tf32(a), round_to_tf32(b)
    product = tf32_product(a - big_a, big_b, np.zeros_like(c))
    product = tf32_product(big_a, b - big_b, product)
    product = np.where(np.isnan(product), np.float32(0), product)
    return tf32_product(big_a, big_b, product) + c


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Within `interpreter()`: products of float32 (by their precision), float16 and bfloat16."""
    from triton._C.libtriton import ir
    from triton.runtime import interpreter as runtime

    plain = runtime.InterpreterBuilder.create_dot
    of_float32 = {
        ir.INPUT_PRECISION.TF32: tf32_product,
        ir.INPUT_PRECISION.TF32x3: tf32x3_product,
    }

    def create_dot(self: Any, a: Any, b: Any, c: Any, precision: Any, imprecise: Any) -> Any:
        left, right = values(a), values(b)
        if a.dtype.scalar.is_fp32():
            if precision not in of_float32:
                return plain(self, a, b, c, precision, imprecise)
            product = of_float32[precision](left, right, c.data)
        else:
            product = mma(left, right, c.data)
        return runtime.TensorHandle(product, c.dtype.scalar)

    with _patched(runtime.InterpreterBuilder, create_dot=create_dot):
        yield


# --- bfloat16 -------------------------------------------------------------------------------------


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The values of raw bits, in float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Raw bits: rounded to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def values(handle: Any) -> np.ndarray:
    """The numbers that a handle stands for."""
    return from_bfloat16(handle.data) if handle.dtype.scalar.is_bf16() else handle.data


@contextmanager
def bfloat16_arithmetic() -> Iterator[None]:
    """Within `interpreter()`: the dispatcher takes bfloat16, and its arithmetic is right."""
    from triton.runtime import interpreter as runtime

    builder = runtime.InterpreterBuilder
    handle_of = runtime.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot
    binary, unary = builder.binary_op, builder.unary_op

    def as_float32(handle: Any) -> Any:
        if not handle.dtype.scalar.is_bf16():
            return handle
        return handle_of(values(handle), runtime.tl.float32)

    def convert(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        result = as_float32(source)
        if target.scalar.is_bf16():
            rounded = to_bfloat16(cast(self, result, runtime.tl.float32).data)
            return handle_of(rounded, runtime.tl.bfloat16)
        return cast(self, result, target)

    def on_values(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, first: Any, *rest: Any) -> Any:
            if not first.dtype.scalar.is_bf16():
                return operation(self, first, *rest)
            operands = [as_float32(one) if isinstance(one, handle_of) else one for one in rest]
            result = operation(self, as_float32(first), *operands)
            return result if result.data.dtype == bool else convert(self, result, first.dtype)

        return run

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, as_float32(a), as_float32(b), *rest)

    table = {
        op: tuple(
            row._replace(why_not=lambda *call: dispatch._load_triton())
            if row.backend == "triton"
            else row
            for row in rows
        )
        for op, rows in dispatch.TABLE.items()
    }
    with (
        _patched(builder, cast_impl=convert, create_fp_to_fp=convert, create_dot=create_dot),
        _patched(builder, binary_op=on_values(binary), unary_op=on_values(unary)),
        _patched(dispatch, TABLE=table),
    ):
        yield


@pytest.fixture(scope="module")
def bfloat16(interpreted: ModuleType) -> Iterator[None]:  # noqa: F811
    """`interpreted`, and bfloat16 is right, for all tests of a module."""
    with bfloat16_arithmetic():
        yield
