"""Cross-attention's kernels on a GPU: streams, graphs, synchronisation, memory, offsets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gpu_helpers import (
    DEVICE,
    assert_same_bits,
    gpu_only,
    kernels,  # noqa: F401
    on_cpu,
    on_device,
    peak_bytes,
    require_memory,
    run_on_device,
    some,
)

import mmfast
from mmfast.testing import eager, tolerance
from mmfast.testing.cases import CROSS_ATTENTION, Case, functional_cases, make_inputs

pytestmark = gpu_only

NAMES = [case.name for case in functional_cases() if max(case.D, case.Dv) <= 256]
EVERYTHING = ["segments_everything", "results_everything", "gqa_3_ragged", "dropout_gate_bias",
              "few_rows_everything", "key_ranges"]  # fmt: skip


def _step(inputs):
    """A function without arguments: forward and backward on these very tensors, every result."""
    options = dict(inputs.options)
    leaves = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    leaves |= {name: options.pop(name) for name in ("bias", "gate") if name in options}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    incoming = (inputs.dout, inputs.dlse, inputs.dimportance, inputs.dweights)

    def step():
        output = mmfast.cross_attention(**leaves, **options, return_lse=True)
        pairs = [(o, g) for o, g in zip(output, incoming, strict=True) if g is not None]
        outputs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        return [*(part for part in output if part is not None), *found]

    return step, leaves, options


# --- synchronisation, graphs, streams, devices --------------------------------------------------


@pytest.mark.parametrize("name", some(NAMES))
def test_nothing_waits_for_the_device(name):
    """Forward and backward, with dropout and lengths: no synchronisation once kernels are built."""
    step, _, _ = _step(on_device(make_inputs(CROSS_ATTENTION[name], torch.bfloat16)))
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", some([torch.bfloat16, torch.float32]), ids=str)
@pytest.mark.parametrize("name", some(EVERYTHING))
def test_a_captured_graph_replays(name, dtype):
    """Forward and backward, captured once: new values, lengths and dropout seeds are seen."""
    step, leaves, options = _step(on_device(make_inputs(CROSS_ATTENTION[name], dtype)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    before = None
    for seed in (7, 8):
        with torch.no_grad():
            for leaf in leaves.values():
                leaf.add_(0.25)
            for lens in ("kv_lens", "q_lens"):
                if lens in options:
                    options[lens].sub_(1).clamp_(min=0)
        torch.manual_seed(seed)
        graph.replay()
        got = [part.clone() for part in captured]
        torch.manual_seed(seed)
        for one, expected in zip(got, step(), strict=True):
            assert torch.equal(one, expected)
        assert before is None or not torch.equal(got[0], before)
        before = got[0]


def test_replays_of_a_graph_drop_anew():
    step, _, _ = _step(on_device(make_inputs(CROSS_ATTENTION["dropout"], torch.float16)))
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()[0]
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)


def test_a_stream_other_than_the_default():
    """What is queued on the stream before the call is waited for, forward and backward."""
    made = make_inputs(CROSS_ATTENTION["gqa_3_ragged"], torch.float16)
    expected = run_on_device(made)
    inputs = on_device(made)
    late = {name: torch.zeros_like(getattr(inputs, name)) for name in ("q", "k", "v", "dout")}
    step, leaves, _ = _step(dataclasses.replace(inputs, **late))
    step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: whoever does not wait sees zeros
        with torch.no_grad():
            for name in ("q", "k", "v"):
                leaves[name].copy_(getattr(inputs, name))
            late["dout"].copy_(inputs.dout)
        out, lse, dq, dk, dv, dgate = step()
    stream.synchronize()
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dgate": dgate}
    assert_same_bits(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")
@pytest.mark.parametrize("name", some(["dense", "segments_everything", "results_everything"]))
def test_a_device_other_than_the_current_one(name):
    against = tolerance.truth(make_inputs(CROSS_ATTENTION[name], torch.bfloat16))
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        results = run_on_device(against.inputs, other)
        assert torch.cuda.current_device() == 0
    assert all(part.device == other for part in results.values())
    tolerance.assert_accurate(on_cpu(results), against)


# --- memory -------------------------------------------------------------------------------------


def _long(length, dtype, direction, function, **options):
    """The peak of a call with N = M = `length`."""
    g = torch.Generator(DEVICE).manual_seed(0)
    shape = (1, 1, length, 64)
    leaves = [torch.randn(shape, generator=g, device=DEVICE, dtype=dtype) for _ in range(3)]
    if direction != "forward":
        leaves = [leaf.requires_grad_() for leaf in leaves]
    if "kv_lens" in options:
        options["kv_lens"] = torch.full((1,), options["kv_lens"], device=DEVICE)

    def call():
        result = function(*leaves, **options)
        if direction == "forward":
            return result
        result = (result,) if isinstance(result, torch.Tensor) else result
        parts = [part.float().sum() for part in result if part is not None]
        return torch.autograd.grad(sum(parts), leaves)

    return peak_bytes(call)


OPTIONS = pytest.mark.parametrize(
    "options",
    some([{}, {"kv_lens": 4000}, {"return_importance": True}, {"dropout_p": 0.1}]),
    ids=lambda options: "_".join(options) or "plain",
)
DIRECTION = pytest.mark.parametrize("direction", some(["forward", "forward_backward"]))


@OPTIONS
@DIRECTION
def test_no_scores_in_memory(options, direction):
    """N = M = 8192: less than 2 % (with backward 3 %) of what eager needs."""
    usual = _long(8192, torch.float32, direction, eager.cross_attention)
    mine = _long(8192, torch.float32, direction, mmfast.cross_attention, **options)
    assert mine < (0.02 if direction == "forward" else 0.03) * usual


@OPTIONS
@DIRECTION
@pytest.mark.parametrize("dtype", some([torch.bfloat16, torch.float32]), ids=str)
def test_memory_grows_with_the_length_not_its_square(options, direction, dtype):
    short, long = (
        _long(length, dtype, direction, mmfast.cross_attention, **options)
        for length in (4096, 16384)
    )
    assert long < 5 * short


def test_a_bias_that_broadcasts_costs_what_it_holds():
    """The gradient of a `[1, H, 1, M]` bias needs no `N x M` of any head."""
    N = M = 4096
    q, k, v = (
        torch.randn(1, 2, N, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    bias = torch.randn(1, 2, 1, M, device=DEVICE, dtype=torch.bfloat16).requires_grad_()

    def call():
        out = mmfast.cross_attention(q, k, v, bias=bias)
        return torch.autograd.grad(out.sum(), (q, k, v, bias))

    assert peak_bytes(call) < N * M * 2 // 2


# --- large tensors ------------------------------------------------------------------------------


def _huge_strides(tensor, buffer):
    """The same values, its second item 2^31 elements behind the first."""
    view = buffer.as_strided(tensor.shape, (2**31, *tensor.stride()[1:]))
    return view.copy_(tensor)


@pytest.mark.parametrize("which", some(["q", "k", "v", "dout", "bias", "gate"]))
def test_strides_beyond_32_bits(which):
    require_memory(6.0)
    case = Case("huge", 2, 2, 37, 70, 32, bias="BHNM", gate="full")
    inputs = on_device(make_inputs(case, torch.float16))
    expected, leaves, _ = _step(inputs)
    buffer = torch.empty(2**31 + 100_000, dtype=torch.float16, device=DEVICE)
    tensor = inputs.options[which] if which in inputs.options else getattr(inputs, which)
    huge = _huge_strides(tensor.contiguous(), buffer)
    if which in inputs.options:
        other = dataclasses.replace(inputs, options={**inputs.options, which: huge})
    else:
        other = dataclasses.replace(inputs, **{which: huge})
    step, leaves, _ = _step(other)
    for got, wanted in zip(step(), expected(), strict=True):
        assert torch.equal(got, wanted)
    assert which == "dout" or leaves[which].stride(0) == 2**31


def test_more_than_2_to_the_31_elements():
    """Of q, out and their gradients: the last rows are what they are alone."""
    rows, D, last = 2**31 // 64 + 512, 64, 128
    require_memory(22.0)
    q = torch.zeros(1, 1, rows, D, dtype=torch.float16, device=DEVICE)
    q[:, :, -last:].normal_()
    k, v = (torch.randn(1, 1, 40, D, dtype=torch.float16, device=DEVICE) for _ in range(2))
    dout = torch.zeros(1, device=DEVICE, dtype=torch.float16).expand(1, 1, rows - last, D)
    end = torch.randn(1, 1, last, D, device=DEVICE, dtype=torch.float16)
    near = {"rtol": 2e-3, "atol": 2e-3}  # few rows may be tiled in another way
    alone = q[:, :, -last:].clone().requires_grad_()
    expected = mmfast.cross_attention(alone, k, v)
    (wanted,) = torch.autograd.grad(expected, alone, end)
    q.requires_grad_()
    out = mmfast.cross_attention(q, k, v)
    torch.testing.assert_close(out[:, :, -last:], expected, **near)
    (dq,) = torch.autograd.grad(out, q, torch.cat([dout, end], dim=2))
    torch.testing.assert_close(dq[:, :, -last:], wanted, **near)
    assert not dq[:, :, :-last].any()


def test_more_than_2_to_the_31_scores_in_a_mask():
    """Byte offsets of a whole `[N, M]` mask; rows with all keys masked but the last."""
    N, M = 2**15 + 64, 2**16
    require_memory(8.0)
    q = torch.randn(1, 1, N, 16, dtype=torch.float16, device=DEVICE)
    k, v = (torch.randn(1, 1, M, 16, dtype=torch.float16, device=DEVICE) for _ in range(2))
    mask = torch.zeros(N, M, dtype=torch.bool, device=DEVICE)
    mask[:, -1] = True
    out = mmfast.cross_attention(q, k, v, mask=mask)
    assert torch.equal(out, v[:, :, -1:].expand_as(out))


@pytest.mark.parametrize(("B", "H"), some([(70_000, 1), (2, 40_000), (1, 66_000)]))
def test_more_heads_than_a_grid_s_second_dim_holds(B, H):
    case = Case("wide_grid", B, H, 3, 5, 16, kv_lens=(4,) * B)
    inputs = on_device(make_inputs(case, torch.float16))
    step, _, _ = _step(inputs)
    whole = step()
    half = max(B, H) // 2
    for part in (slice(None, half), slice(half, None)):
        cut = (part, slice(None)) if B > H else (slice(None), part)
        fields = {name: getattr(inputs, name)[cut] for name in ("q", "k", "v", "dout")}
        lens = inputs.options["kv_lens"][cut[0]]
        some_of_it = dataclasses.replace(inputs, options={"kv_lens": lens}, **fields)
        step, _, _ = _step(some_of_it)
        for got, expected in zip(step(), whole, strict=True):
            assert torch.equal(got, expected[cut])
