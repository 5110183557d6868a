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


@pytest.mark.usefixtures("compiled_library")
def test_offsets_beyond_32_bits():
    """Two items 2^31 elements apart, of which only their own pages are ever touched."""
    room = torch.empty(2**31 + 4096, dtype=torch.bfloat16)

    def far(offset):
        x = room.as_strided((2, 3, 16), (2**31, 16, 1), offset)
        x.copy_(torch.randn(2, 3, 16))
        return x

    x, y = far(0), far(64)
    side = torch.randn(2, 16).bfloat16()
    calls = {
        "gated_residual": lambda a, b: mmfast.gated_residual(a, b, side),
        "glu": lambda a, b: mmfast.glu(a, b),
        "glu_packed": lambda a, b: mmfast.glu_packed(a) * b[..., :8],
        "fuse": lambda a, b: mmfast.fuse([a, b], torch.zeros(2), mode="softmax"),
        "modulate": lambda a, b: mmfast.modulate(a, side, residual=b).out,
        "adaptation_gate": lambda a, b: mmfast.adaptation_gate(a, b),
    }
    with mmfast.use_backend("cpu"):
        for op, call in calls.items():
            results = []
            for pair in ((x, y), (x.contiguous(), y.contiguous())):
                leaves = [t.detach().requires_grad_() for t in pair]
                out = call(*leaves)
                results.append((out, *torch.autograd.grad(out.float().sin().sum(), leaves)))
            for got, expected in zip(*results, strict=True):
                assert torch.equal(got, expected), op


def test_many_items(backend):
    """More items than a grid's second dim may have, 65,535."""
    x = torch.randn(70_000, 1, 3)
    gate = torch.randn(70_000, 3)
    expected = x + torch.tanh(gate)[:, None] * x
    torch.testing.assert_close(mmfast.gated_residual(x, x, gate), expected)


@pytest.mark.usefixtures("compiled_library")
@pytest.mark.parametrize("op", ["gated_residual", "modulate", "adaptation_gate"])
def test_sums_over_rows_lose_nothing(op, gate_implementation):
    """What tasks leave is added as if in twice the precision: 2^38 comes and goes, ones stay."""
    if gate_implementation.backend == "reference":
        pytest.skip("the reference sums as torch does: the promise is that of the kernels")
    quarter, C = 8192, 16
    dout = torch.ones(1, 4 * quarter, C)
    dout[:, :quarter], dout[:, 2 * quarter : 3 * quarter] = 2.0**24, -(2.0**24)
    x, side = torch.ones_like(dout), torch.zeros(C, requires_grad=True)
    calls = {
        "gated_residual": lambda: mmfast.gated_residual(x, x, side, activation="identity"),
        "modulate": lambda: mmfast.modulate(x, norm=None, bias=side),
        "adaptation_gate": lambda: mmfast.adaptation_gate(x, x, bias=side),
    }
    (grad,) = torch.autograd.grad(calls[op](), side, dout)
    assert torch.equal(grad, torch.full((C,), 2.0 * quarter))
    dout[0, 0, 0] = float("inf")
    (grad,) = torch.autograd.grad(calls[op](), side, dout)
    assert grad[0] == float("inf")
    assert torch.equal(grad[1:], torch.full((C - 1,), 2.0 * quarter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid", "identity"])
def test_activations_at_zero_and_infinity(activation, dtype, gate_implementation):
    """relu's slope at 0 is 0, as torch's; infinities and NaN give what torch gives in float64."""
    if gate_implementation.backend == "reference":
        pytest.skip("torch's own gelu(inf) is NaN in float32 and inf in float64")
    points = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")], dtype=dtype)
    a = points.repeat(7)[None, None].requires_grad_()  # in whole vectors and in tails
    out = mmfast.glu(a, torch.ones_like(a), activation)
    (slope,) = torch.autograd.grad(out.sum(), a)
    expected = points.double().requires_grad_()
    value = mmfast.reference.glu(expected, torch.ones_like(expected), activation)
    (wanted,) = torch.autograd.grad(value.sum(), expected)
    value = value.detach().to(dtype).repeat(7)[None, None]
    torch.testing.assert_close(out.detach(), value, equal_nan=True, rtol=0, atol=0)
    zeros = (a == 0).detach()
    assert torch.equal(slope[zeros], wanted.to(dtype).repeat(7)[None, None][zeros])
    assert slope[a.isnan()].isnan().all() or activation in ("relu", "identity")
