"""`modulate` in Triton, interpreted under the guard: the registry's cases, and its own paths."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from triton_helpers import check_case, interpreted, requires_triton, triton_cases  # noqa: F401

import mmfast
from mmfast.testing.gate_cases import GATES, GateCase
from mmfast.testing.gate_inputs import make_gate_inputs
from mmfast.testing.gate_tolerance import assert_gate_accurate, gate_truth

pytestmark = [requires_triton, pytest.mark.usefixtures("interpreted")]

DTYPES = (torch.float32, torch.float16)
AFFINE = (("weight", "C"), ("bias", "C"))


def sides(gate: str, scale: str, shift: str) -> tuple[tuple[str, str], ...]:
    return (("gate", gate), ("scale", scale), ("shift", shift), *AFFINE)


def kernel_module(name: str):
    return importlib.import_module(f"mmfast.kernels.{name}")


def check(monkeypatch, case: GateCase, dtype: torch.dtype) -> None:
    monkeypatch.setitem(GATES, case.name, case)
    check_case(case.name, dtype)


@pytest.mark.parametrize("name, dtype", triton_cases("modulate"))
def test_case(name, dtype):
    check_case(name, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("forms", [("BC", "BC", "BC"), ("BNC", "BC", "BNC"), ("C", "BNC", "C")])
def test_rows_that_are_read_in_blocks(monkeypatch, norm, forms, dtype):
    for name in ("modulate", "modulate_bwd"):
        module = kernel_module(name)
        monkeypatch.setattr(module, "MAX_TILE_C", 16)
        monkeypatch.setattr(module, "_LOOP_C", 32)
    monkeypatch.setattr(kernel_module("modulate"), "_FILM_C", 32)
    monkeypatch.setattr(kernel_module("modulate_bwd"), "_SPLIT_C", 16)
    case = GateCase(
        "modulate", "blocks", (2, 11, 77), sides=sides(*forms), norm=norm, residual=True
    )
    check(monkeypatch, case, dtype)
    check(monkeypatch, GateCase("modulate", "plain", (1, 5, 77), norm=norm), dtype)


def test_a_mean_far_from_zero_in_blocks(monkeypatch):
    monkeypatch.setattr(kernel_module("modulate"), "MAX_TILE_C", 16)
    monkeypatch.setattr(kernel_module("modulate"), "_LOOP_C", 16)
    monkeypatch.setattr(kernel_module("modulate_bwd"), "MAX_TILE_C", 16)
    monkeypatch.setattr(kernel_module("modulate_bwd"), "_LOOP_C", 16)
    check(monkeypatch, GateCase("modulate", "far", (2, 5, 100), special="offset"), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "forms", [("BC", "1NC", "C"), ("1NC", "BC", "BNC"), ("1NC", "1NC", "1NC"), ("C", "C", "1NC")]
)
def test_sums_over_items_and_over_rows(monkeypatch, forms, dtype):
    case = GateCase("modulate", "sums", (3, 21, 37), sides=sides(*forms), residual=True)
    check(monkeypatch, case, dtype)


def test_many_chunks_are_summed_in_two_levels(monkeypatch):
    rows = kernel_module("_rows")
    monkeypatch.setattr(rows, "_SUM_AT_ONCE", 8)
    monkeypatch.setattr(rows, "_SUM_FIRST", 3)
    case = GateCase("modulate", "chunks", (29, 3, 24), sides=sides("BC", "BC", "BC"), residual=True)
    check(monkeypatch, case, torch.float32)


@pytest.mark.parametrize("wanted", ["x", "residual", "gate", "scale", "shift", "weight", "bias"])
@pytest.mark.parametrize("forms", [("BC", "BC", "BC"), ("BNC", "BNC", "BNC")])
def test_one_gradient_alone(wanted, forms):
    case = GateCase("modulate", "alone", (2, 7, 33), sides=sides(*forms), residual=True)
    inputs = make_gate_inputs(case)
    truth = gate_truth(inputs)
    leaves = {
        name: leaf.requires_grad_() if name == wanted else leaf
        for name, leaf in inputs.leaves.items()
    }
    with mmfast.use_backend("triton"):
        output = inputs.call(mmfast.modulate, leaves)
    parts = output._asdict()
    grads = torch.autograd.grad(
        list(parts.values()), leaves[wanted], [inputs.incoming[name] for name in parts]
    )
    exact = {f"d{wanted}": truth.exact[f"d{wanted}"]}
    assert_gate_accurate({f"d{wanted}": grads[0]}, truth._replace(exact=exact))


def arguments(B: int, N: int, C: int):
    g = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    data = [tensor(B, N, C) for _ in range(4)]  # dout, dh, x, h
    return data, [tensor(B, 1, C) for _ in range(3)], [tensor(C) for _ in range(2)]


def test_an_absent_gradient_counts_as_zero():
    bwd = kernel_module("modulate_bwd").modulate_bwd
    (dout, dh, x, h), (gate, scale, shift), (weight, bias) = arguments(2, 7, 33)
    rest = (x, h, gate, scale, weight, bias, 1, 1e-5, shift, [True] * 7)
    zero = torch.zeros_like(dout)
    for given, absent in (((dout, zero), (dout, None)), ((zero, dh), (None, dh))):
        for a, b in zip(bwd(*given, *rest), bwd(*absent, *rest)):
            assert torch.equal(a, b)
    dresidual, dscale = (bwd(None, dh, *rest)[i] for i in (1, 3))
    assert torch.equal(dresidual, dh)
    assert not dscale.any()


def test_rows_do_not_reach_one_another():
    """Rows of several items lie in one tile; eps = 0 makes rows past the end 0 * inf."""
    fwd = kernel_module("modulate").modulate_fwd
    bwd = kernel_module("modulate_bwd").modulate_bwd
    (dout, dh, x, residual), (gate, scale, shift), (weight, bias) = arguments(3, 5, 17)

    def run():
        out, h = fwd(x, residual, gate, scale, shift, weight, bias, 1, 0.0)
        rest = (gate, scale, weight, bias, 1, 0.0, shift, [True] * 7)
        return out, h, *bwd(dout, dh, x, h, *rest)[:5]

    clean = run()
    x[1] = float("nan")
    for whole, poisoned in zip(clean, run()):
        assert whole.isfinite().all()
        assert torch.equal(whole[[0, 2]], poisoned[[0, 2]])
        assert poisoned[1].isnan().any() or poisoned[1].equal(whole[1])  # dshift is the sum of dout


def test_offsets_past_two_to_the_31():
    fwd = kernel_module("modulate").modulate_fwd
    bwd = kernel_module("modulate_bwd").modulate_bwd
    memory = torch.from_numpy(np.zeros(2**31 + 64, np.float16))  # untouched pages cost nothing
    x = memory.as_strided((2, 3, 8), (2**31, 8, 1))
    x.copy_(torch.randn(2, 3, 8))
    for norm in (0, 1, 2):
        results = [
            (
                *fwd(data, None, None, None, None, None, None, norm, 1e-5),
                *bwd(data, None, data, None, *[None] * 4, norm, 1e-5, None, [True] + [False] * 6),
            )
            for data in (x, x.contiguous())
        ]
        for far, near in zip(*results):
            assert torch.equal(far, near)
