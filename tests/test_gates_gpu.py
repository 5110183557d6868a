"""The Triton kernels of the gating ops on a GPU; every test here runs where CUDA is."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import DTYPES, gpu_only, on_device, some

import mmfast
from mmfast.testing.gate_cases import GATES, functional_gate_cases, make_gate_inputs
from mmfast.testing.gate_tolerance import assert_gate_accurate, gate_truth, run_gate

pytestmark = gpu_only

OPS = ("gated_residual", "glu", "glu_packed", "fuse", "modulate", "adaptation_gate")
CASES = some([name for op in OPS for name in functional_gate_cases(op)])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_case(name, dtype):
    against = gate_truth(make_gate_inputs(GATES[name], dtype))
    function = getattr(mmfast, GATES[name].op)
    with mmfast.use_backend("triton"):
        results = run_gate(function, on_device(against.inputs))
        again = run_gate(function, on_device(against.inputs))
    for key, value in results.items():
        assert torch.equal(value.nan_to_num(), again[key].nan_to_num()), (
            f"{key} differs between runs"
        )
    assert_gate_accurate({key: value.cpu() for key, value in results.items()}, against)


@pytest.mark.parametrize("name", CASES)
def test_nothing_masked_leaks(name):
    if not make_gate_inputs(GATES[name]).unused():
        return
    function = getattr(mmfast, GATES[name].op)
    inputs = make_gate_inputs(GATES[name], torch.float32)
    with mmfast.use_backend("triton"):
        clean = run_gate(function, on_device(inputs))
        poisoned = run_gate(function, on_device(inputs.poisoned()))
    for key, value in clean.items():
        assert torch.equal(poisoned[key], value), key


def test_a_captured_graph_replays():
    """No host synchronisation: forward and backward can be captured."""
    x, y = (torch.randn(4, 64, 256, device="cuda", requires_grad=True) for _ in range(2))
    gate = torch.zeros(256, device="cuda", requires_grad=True)

    def step():
        out = mmfast.gated_residual(x, mmfast.glu(x, y), gate)
        return (out, *torch.autograd.grad(out.sum(), (x, y, gate)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        gate += 1.0
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


def test_through_inductor():
    x, y = (torch.randn(4, 64, 256, device="cuda", requires_grad=True) for _ in range(2))

    def function(x, y):
        return mmfast.modulate(mmfast.glu(x, y), norm="rms")

    compiled = torch.compile(function, fullgraph=True)
    results = []
    for one in (compiled, function):
        out = one(x, y)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, y))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
