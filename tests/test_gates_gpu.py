"""The gating ops on a GPU, CUDA C++ and Triton; every test here runs where a device is."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import (
    DEVICE,
    DTYPES,
    gpu_only,
    kernels,  # noqa: F401
    on_device,
    require_memory,
    some,
)

import mmfast
from mmfast.testing.gate_cases import GATES, functional_gate_cases, make_gate_inputs
from mmfast.testing.gate_tolerance import assert_gate_accurate, gate_truth, run_gate

pytestmark = gpu_only

OPS = ("gated_residual", "glu", "glu_packed", "fuse", "modulate", "adaptation_gate")
CASES = some([name for op in OPS for name in functional_gate_cases(op)])
LARGEST = {
    op: max(
        (name for name in functional_gate_cases(op) if GATES[name].layout == "dense"),
        key=lambda name: torch.Size(GATES[name].shape).numel(),
    )
    for op in OPS
}


def _run(name, inputs):
    return run_gate(getattr(mmfast, GATES[name].op), inputs)


def _same(results, expected):
    for key, value in expected.items():
        assert torch.equal(results[key].nan_to_num(), value.nan_to_num()), f"{key} differs"


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", some(DTYPES), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_case(name, dtype):
    """Forward and backward by the ruler, twice the same bits."""
    against = gate_truth(make_gate_inputs(GATES[name], dtype))
    results = _run(name, on_device(against.inputs))
    _same(_run(name, on_device(against.inputs)), results)
    assert_gate_accurate({key: value.cpu() for key, value in results.items()}, against)


@pytest.mark.parametrize("name", CASES)
def test_nothing_masked_leaks(name):
    if not make_gate_inputs(GATES[name]).unused():
        return
    inputs = make_gate_inputs(GATES[name], torch.float32)
    clean = _run(name, on_device(inputs))
    poisoned = _run(name, on_device(inputs.poisoned()))
    for key, value in clean.items():
        assert torch.equal(poisoned[key], value), key


@pytest.mark.parametrize("op", some(OPS))
def test_every_element_is_written(op):
    """torch.empty comes filled with NaN, in the kernels' own allocations as well."""
    inputs = on_device(make_gate_inputs(GATES[LARGEST[op]], torch.float32))
    expected = _run(LARGEST[op], inputs)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        results = _run(LARGEST[op], inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in expected.items():
        assert torch.equal(results[key], value), key


@pytest.mark.parametrize("op", some(OPS))
def test_100_repeats(op):
    inputs = on_device(make_gate_inputs(GATES[LARGEST[op]], torch.bfloat16))
    expected = _run(LARGEST[op], inputs)
    for _ in range(100):
        _same(_run(LARGEST[op], inputs), expected)


# --- the device ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize("op", some(OPS))
def test_nothing_waits_for_the_device(op):
    inputs = on_device(make_gate_inputs(GATES[LARGEST[op]], torch.bfloat16))
    _run(LARGEST[op], inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(LARGEST[op], inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", some(OPS))
def test_a_stream_other_than_the_default(op):
    """What is queued on the stream before the call is waited for, forward and backward."""
    inputs = on_device(make_gate_inputs(GATES[LARGEST[op]], torch.float16))
    expected = _run(LARGEST[op], inputs)
    late = on_device(make_gate_inputs(GATES[LARGEST[op]], torch.float16))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for leaf in late.leaves.values():
            leaf.zero_()
        torch.cuda._sleep(200_000_000)  # cycles: whoever does not wait sees zeros
        for key, leaf in late.leaves.items():
            leaf.copy_(inputs.leaves[key])
        results = _run(LARGEST[op], late)
    stream.synchronize()
    _same(results, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")
@pytest.mark.parametrize("op", some(OPS))
def test_a_device_other_than_the_current_one(op):
    against = gate_truth(make_gate_inputs(GATES[LARGEST[op]], torch.bfloat16))
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        results = _run(LARGEST[op], on_device(against.inputs, other))
        assert torch.cuda.current_device() == 0
    assert all(part.device == other for part in results.values())
    assert_gate_accurate({key: value.cpu() for key, value in results.items()}, against)


def test_through_inductor():
    x, y = (torch.randn(4, 64, 256, device="cuda", requires_grad=True) for _ in range(2))

    def function(x, y):
        return mmfast.modulate(mmfast.glu(x, y), norm="rms")

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    results = []
    for one in (compiled, function):
        out = one(x, y)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, y))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


# --- large tensors ------------------------------------------------------------------------------


def _calls(side):
    return {
        "gated_residual": lambda a, b: mmfast.gated_residual(a, b, side),
        "glu": lambda a, b: mmfast.glu(a, b),
        "glu_packed": lambda a, b: mmfast.glu_packed(a) * b[..., :8],
        "fuse": lambda a, b: mmfast.fuse([a, b], torch.zeros(2, device=DEVICE), mode="softmax"),
        "modulate": lambda a, b: mmfast.modulate(a, side, residual=b).out,
        "adaptation_gate": lambda a, b: mmfast.adaptation_gate(a, b, beta=1.0),
    }


@pytest.mark.parametrize("op", some(OPS))
def test_strides_beyond_32_bits(op):
    """Two items 2^31 elements apart."""
    require_memory(6.0)
    room = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=DEVICE)
    call = _calls(torch.randn(2, 16, dtype=torch.bfloat16, device=DEVICE))[op]
    near = [torch.randn(2, 3, 16, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    far = [
        room.as_strided((2, 3, 16), (2**31, 16, 1), offset).copy_(x)
        for offset, x in zip((0, 64), near, strict=True)
    ]
    results = []
    for tensors in (near, far):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = call(*leaves)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("op", some(OPS))
def test_more_than_2_to_the_31_elements(op):
    """The last rows are what they are alone."""
    require_memory(24.0)
    channels, last = 16, 32
    rows = 2**31 // channels + 96
    call = _calls(torch.randn(1, 16, dtype=torch.bfloat16, device=DEVICE))[op]
    a = torch.zeros(1, rows, channels, dtype=torch.bfloat16, device=DEVICE)
    a[:, -last:].normal_()
    with torch.no_grad():
        out = call(a, a)
        expected = call(a[:, -last:].clone(), a[:, -last:].clone())
    assert torch.equal(out[:, -last:], expected)
