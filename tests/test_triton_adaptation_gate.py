"""`adaptation_gate` in Triton, interpreted under the guard: registry cases, and its own paths."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from triton_helpers import check_case, interpreted, requires_triton, triton_cases  # noqa: F401

from mmfast.testing.gate_cases import GATES, GateCase

pytestmark = [requires_triton, pytest.mark.usefixtures("interpreted")]

AFFINE = (("weight", "C"), ("bias", "C"))


def kernel_module(name: str):
    return importlib.import_module(f"mmfast.kernels.{name}")


def check(monkeypatch, case: GateCase, dtype: torch.dtype) -> None:
    monkeypatch.setitem(GATES, case.name, case)
    check_case(case.name, dtype)


@pytest.mark.parametrize("name, dtype", triton_cases("adaptation_gate"))
def test_case(name, dtype):
    check_case(name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sides", [AFFINE, AFFINE[:1], ()])
@pytest.mark.parametrize("special, row_mask", [("", "BN"), ("zero_rows", "1N"), ("zero_rows", "")])
def test_rows_that_are_read_in_blocks(monkeypatch, special, row_mask, sides, dtype):
    for name in ("adaptation_gate", "adaptation_gate_bwd"):
        module = kernel_module(name)
        monkeypatch.setattr(module, "MAX_TILE_C", 16)
        monkeypatch.setattr(module, "_LOOP_C", 32)
    monkeypatch.setattr(kernel_module("adaptation_gate_bwd"), "_SPLIT_C", 16)
    case = GateCase(
        "adaptation_gate", "blocks", (2, 5, 77), sides=sides, special=special,
        row_mask=row_mask, beta=0.5,
    )  # fmt: skip
    check(monkeypatch, case, dtype)


def test_many_chunks_are_summed_in_two_levels(monkeypatch):
    rows = kernel_module("_rows")
    monkeypatch.setattr(rows, "_SUM_AT_ONCE", 2)
    monkeypatch.setattr(rows, "_SUM_FIRST", 2)
    case = GateCase("adaptation_gate", "chunks", (3, 90, 130), sides=AFFINE, beta=0.5)
    check(monkeypatch, case, torch.float32)


def arguments(B: int, N: int, C: int):
    g = torch.Generator().manual_seed(0)
    data = [torch.randn(B, N, C, generator=g) for _ in range(3)]  # dout, z, h
    return data, [torch.randn(C, generator=g) for _ in range(2)]


def test_needs():
    """Each gradient alone has the bits that it has beside the others."""
    bwd = kernel_module("adaptation_gate_bwd").adaptation_gate_bwd
    (dout, z, h), (weight, bias) = arguments(2, 5, 33)
    rest = (dout, z, h, weight, bias, None, 0.5, 1e-5)
    together = bwd(*rest, [True] * 4)
    for chosen in range(16):
        needs = [bool(chosen >> i & 1) for i in range(4)]
        for grad, needed, whole in zip(bwd(*rest, needs), needs, together):
            assert torch.equal(grad, whole) if needed else grad.numel() == 0


def test_rows_do_not_reach_one_another():
    """eps = 0 makes rows past the end of a tile 0 * inf."""
    fwd = kernel_module("adaptation_gate").adaptation_gate_fwd
    bwd = kernel_module("adaptation_gate_bwd").adaptation_gate_bwd
    (dout, z, h), (weight, bias) = arguments(3, 5, 17)

    def run():
        rest = (z, h, weight, bias, None, 0.5, 0.0)
        return fwd(*rest), *bwd(dout, *rest, [True] * 4)

    clean = run()
    assert all(result.isfinite().all() for result in clean)
    h[1, 2, 3] = float("nan")
    for whole, poisoned in zip(clean[:3], run()[:3]):
        assert torch.equal(whole[[0, 2]], poisoned[[0, 2]])
        assert poisoned[1, 2].isnan().all()


def test_small_norms_have_finite_gradients():
    """1 / |h|^2 would be inf in fp32."""
    bwd = kernel_module("adaptation_gate_bwd").adaptation_gate_bwd
    (dout, z, h), (weight, bias) = arguments(2, 5, 32)
    grads = bwd(dout, z * 1e-21, h * 3e-21, weight, bias, None, 1.0, 1e-5, [True] * 4)
    assert all(grad.isfinite().all() for grad in grads)


def test_offsets_past_two_to_the_31():
    fwd = kernel_module("adaptation_gate").adaptation_gate_fwd
    bwd = kernel_module("adaptation_gate_bwd").adaptation_gate_bwd
    memory = torch.from_numpy(np.zeros(2**31 + 64, np.float16))  # untouched pages cost nothing
    z = memory.as_strided((2, 3, 8), (2**31, 8, 1))
    z.copy_(torch.randn(2, 3, 8))
    results = [
        (
            fwd(data, data.flip(2), None, None, None, 0.5, 1e-5),
            *bwd(data, data, data.flip(2), None, None, None, 0.5, 1e-5, [True, True, False, False]),
        )
        for data in (z, z.contiguous())
    ]
    for far, near in zip(*results):
        assert torch.equal(far, near)
