"""Every gating case x dtype x implementation, forward and backward, under the one ruler."""

from __future__ import annotations

import functools

import pytest
import torch

import mmfast
from mmfast.testing.gate_cases import GATE_LAYOUTS, GATES, functional_gate_cases, make_gate_inputs
from mmfast.testing.gate_tolerance import GateTruth, assert_gate_accurate, gate_truth, run_gate

OPS = ("gated_residual", "glu", "glu_packed", "fuse", "modulate", "adaptation_gate")
CASES = [name for op in OPS for name in functional_gate_cases(op)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MASKED = [name for name in CASES if GATES[name].row_mask or GATES[name].present not in ("", "all")]


def _function(name):
    return getattr(mmfast, GATES[name].op)


@functools.lru_cache(maxsize=2048)
def _truth(name: str, dtype: torch.dtype) -> GateTruth:
    return gate_truth(make_gate_inputs(GATES[name], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_case(name, dtype, gate_implementation):
    against = _truth(name, dtype)
    assert_gate_accurate(run_gate(_function(name), against.inputs), against)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", MASKED)
def test_nothing_masked_leaks(name, value, gate_implementation):
    """Bit for bit: what takes no part may hold anything."""
    inputs = make_gate_inputs(GATES[name], torch.float32)
    clean = run_gate(_function(name), inputs)
    poisoned = run_gate(_function(name), inputs.poisoned(value))
    for result, expected in clean.items():
        assert torch.equal(poisoned[result].nan_to_num(777.0), expected.nan_to_num(777.0)), result


@pytest.mark.parametrize("layout", GATE_LAYOUTS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("compiled_library")
def test_memory_of_the_results(op, layout):
    """Results lie in memory as the data do, sequence first or items first; otherwise dense."""
    inputs = make_gate_inputs(GATES[f"{op}-layout_{layout}"], torch.float32)
    with mmfast.use_backend("cpu"):
        results = run_gate(getattr(mmfast, op), inputs)
    data = next(iter(inputs.leaves.values()))
    turned = data.stride(0) < data.stride(1) and layout != "columns"
    for name in ("out", "h"):
        if name in results:
            out = results[name]
            assert (out.transpose(0, 1) if turned else out).is_contiguous(), name
