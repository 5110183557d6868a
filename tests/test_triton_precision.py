"""float32 by tensor cores: what "tf32x3", "tf32" and "ieee" make of the attention kernels.

The products are emulated (triton_numerics.py), the rest of a kernel is interpreted. "tf32x3", the
default on NVIDIA, meets the ruler; "tf32", which the user has to ask for, is off as 11 bits are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from triton_helpers import HAS_TRITON, _patched, interpreter

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, functional_cases, make_inputs

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_numerics import (
    cut_to_tf32,
    mma,
    round_to_tf32,
    tensor_cores,
    tf32_product,
    tf32x3_product,
)

WIDEST = 256
CASES = (
    "tiny", "dense", "big_scores", "gqa_2", "causal_lens", "width_17", "width_80", "width_128",
    "width_256", "bias_BHNM", "dropout_gate_bias", "importance",
)  # fmt: skip


@pytest.fixture
def emulated() -> Iterator[None]:
    with interpreter(), tensor_cores():
        yield


def _cases():
    for case in functional_cases():
        if max(case.D, case.Dv) <= WIDEST:
            marks = [] if case.name in CASES else [pytest.mark.slow]
            yield pytest.param(case.name, id=case.name, marks=marks)


def _judged(name: str, precision: str) -> tuple[tolerance.Results, tolerance.Truth]:
    from mmfast.kernels import _tuning

    inputs = make_inputs(CROSS_ATTENTION[name], torch.float32)
    against = tolerance.truth(inputs)
    with (
        mmfast.use_backend("triton"),
        _patched(_tuning, precision=lambda device, dtype: precision),
    ):
        return tolerance.run(mmfast.cross_attention, inputs.poisoned()), against


# --- the registry ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", list(_cases()))
def test_tf32x3_meets_the_ruler(name):
    tolerance.assert_accurate(*_judged(name, "tf32x3"))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["dense", "width_256", "big_scores"])
def test_tf32_is_off_as_11_bits_are(name):
    """Operands that are cut off lose up to 2^-10 of themselves, and 2^-11 on average."""
    results, against = _judged(name, "tf32")
    verdicts = {verdict.name: verdict for verdict in tolerance.judge(results, against)}
    assert not any(verdicts[name].ok for name in ("out", "lse", "dq", "dk", "dv"))
    for verdict in verdicts.values():
        size = float(against.exact[verdict.name].square().mean().sqrt())
        worst = 8 if name == "big_scores" else 1  # an error of a score grows with the score
        assert 2.0**-14 * size < verdict.rms < worst * 2.0**-8 * size, str(verdict)


def test_choice_of_the_precision():
    from mmfast.kernels import _tuning

    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    matmul = torch.backends.cuda.matmul
    assert _tuning.precision(cpu, torch.float32) == "ieee"
    assert _tuning.precision(cuda, torch.float16) == "ieee"  # of no meaning there
    with _patched(matmul, fp32_precision="ieee"):
        assert _tuning.precision(cuda, torch.float32) == "tf32x3"
    with _patched(matmul, fp32_precision="tf32"):
        assert _tuning.precision(cuda, torch.float32) == "tf32"


# --- the emulation --------------------------------------------------------------------------------


def test_operands_of_11_bits():
    g = np.random.default_rng(0)
    x = (g.standard_normal(100_000) * 10.0 ** g.integers(-30, 30, 100_000)).astype(np.float32)
    for convert, most in ((round_to_tf32, 2.0**-11), (cut_to_tf32, 2.0**-10)):
        y = convert(x)
        assert not (y.view(np.uint32) & 0x1FFF).any()
        assert (np.abs(y.astype(np.float64) - x) <= most * np.abs(x)).all()
    tie = np.float32(1 + 2.0**-11)
    assert round_to_tf32(np.array([tie, -tie])).tolist() == [1 + 2.0**-10, -1 - 2.0**-10]
    assert cut_to_tf32(np.array([tie, -tie])).tolist() == [1.0, -1.0]
    special = np.array([np.inf, -np.inf, np.nan], np.float32)
    assert np.array_equal(round_to_tf32(special), special, equal_nan=True)


def test_sums_are_cut_off():
    """Of 1 and four terms below its last bit nothing is left; of integers nothing is lost."""
    small = np.full((1, 4), 2.0**-12, np.float32)
    assert mma(small, small.T, np.ones((1, 1), np.float32)) == 1.0
    g = np.random.default_rng(0)
    a, b = (g.integers(-1024, 1024, (16, 16)).astype(np.float32) for _ in range(2))
    assert (mma(a, b, a) == a @ b + a).all()


@pytest.mark.parametrize("K", [16, 64, 256])
def test_errors_of_products(K):
    """Of random products, against the size of their sum: 2^-11 and 2^-21, give or take."""
    g = np.random.default_rng(0)
    a, b = (g.standard_normal(shape).astype(np.float32) for shape in ((64, K), (K, 32)))
    c = np.zeros((64, 32), np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    tf32, tf32x3 = (
        np.sqrt(np.mean((product(a, b, c) - exact) ** 2) / np.mean(exact**2))
        for product in (tf32_product, tf32x3_product)
    )
    assert 2.0**-13 < tf32 < 2.0**-9
    assert tf32x3 < 2.0**-20


def test_an_infinity_is_not_made_nan_by_its_parts():
    a, b = np.ones((1, 4), np.float32), np.full((4, 1), np.inf, np.float32)
    with np.errstate(invalid="ignore"):
        assert np.isposinf(tf32x3_product(a, b, np.zeros((1, 1), np.float32)))


def dot_kernel(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr):
    i = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    product = tl.dot(
        tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i), input_precision=PRECISION
    )
    tl.store(c_ptr + i, product)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_makes_the_products_that_are_emulated(arch):
    """tf32: one product of the operands as they are. tf32x3: small x big, big x small, big x big.

    And in this order, without what is NaN of the first two, and the sum before is added last.
    """
    signature = {"a_ptr": "*fp32", "b_ptr": "*fp32", "c_ptr": "*fp32", "PRECISION": "constexpr"}
    code = {}
    for precision in ("tf32", "tf32x3"):
        source = ASTSource(triton.jit(dot_kernel), signature, {"PRECISION": precision})
        options = {"num_warps": 4, "enable_fp_fusion": True}
        code[precision] = triton.compile(source, GPUTarget("cuda", arch, 32), options).asm["ttgir"]
    assert code["tf32"].count("tt.dot") == 1
    assert "tt.elementwise_inline_asm" not in code["tf32"]
    value = r"(%[\w-]+)"
    lines = [line for line in code["tf32x3"].splitlines() if " = " in line]
    text = "\n".join(re.sub(r" [:{].*", "", line) for line in lines)
    big = re.findall(rf'{value} = tt.elementwise_inline_asm "cvt.rna.tf32.f32 \$0, \$1;"', text)
    small = [re.search(rf"{value} = arith.subf %[\w-]+, {one}\b", text)[1] for one in big]
    products = re.findall(rf"{value} = tt.dot {value}, {value}, {value}", text)
    assert len(big) == 2 and len(products) == 3
    (first, *ab, _), (second, *cd, before), (third, *ef, rest) = products
    assert (ab, cd, ef) == ([small[0], big[1]], [big[0], small[1]], big)
    assert before == first
    assert re.search(rf"{rest} = arith.select %[\w-]+, %[\w-]+, {second}\b", text)
    assert re.search(rf"arith.addf {third}, ", text)
