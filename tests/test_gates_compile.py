"""The gating ops under opcheck, torch.compile, torch.export, autocast, fake tensors, checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mmfast
from mmfast import dispatch
from mmfast.testing.gate_cases import GATES, make_gate_inputs
from mmfast.testing.gate_tolerance import assert_gate_accurate, gate_truth, run_gate

# Several shapes and layouts: a fake that hard-codes one shape passes with that shape alone.
OPCHECKED = [
    "gated_residual-mask_BN_BC", "gated_residual-layout_sequence_first",
    "gated_residual-float32_same", "glu-layout_sequence_first", "glu-empty_rows",
    "glu_packed-layout_sequence_first", "glu_packed-gelu", "fuse-softmax_BNK_present",
    "fuse-layout_sequence_first", "fuse-gmu_1NKC", "fuse-empty_rows", "modulate-empty_rows",
    "gated_residual-empty_rows", "adaptation_gate-empty_rows", "fuse-pair_B1C_present",
    "modulate-layer_all_BC", "modulate-layout_sequence_first", "modulate-rms_plain",
    "modulate-film_chunk", "adaptation_gate-mask_BN", "adaptation_gate-layout_sequence_first",
]  # fmt: skip
COMPILED = [
    "gated_residual-mask_BN_BC", "gated_residual-item_4d", "glu-rank_4d", "glu_packed-gelu",
    "fuse-softmax_BNK_present", "fuse-pair_BNC", "modulate-layer_all_BC", "modulate-film_1NC",
    "adaptation_gate-mask_BN",
]  # fmt: skip


def _function(name):
    return getattr(mmfast, GATES[name].op)


class _Recorder:
    """Stands in for a torch op and keeps what it is called with."""

    def __init__(self, op):
        self.op, self.calls = op, []

    def __call__(self, *args):
        self.calls.append(args)
        return self.op(*args)


def _detached(value, differentiable):
    if isinstance(value, list):
        return [_detached(one, differentiable) for one in value]
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_(differentiable and value.is_floating_point())
    return value


@pytest.mark.usefixtures("compiled_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name, dtype, monkeypatch):
    """With the arguments that a real forward and backward give to the two torch ops."""
    inputs = make_gate_inputs(GATES[name], dtype)
    op = GATES[name].op
    with mmfast.use_backend("cpu"):
        run_gate(_function(name), inputs)  # loads and registers
        assert dispatch._kernels is not None
        fwd, bwd = dispatch._kernels[op][:2]
        forward, backward = _Recorder(fwd), _Recorder(bwd)
        spied = dispatch.GateKernels(forward, backward, forward, backward)
        monkeypatch.setitem(dispatch._kernels, op, spied)
        run_gate(_function(name), inputs)
    for recorded, original in ((forward, fwd), (backward, bwd)):
        assert len(recorded.calls) == 1
        args = tuple(_detached(value, original is fwd) for value in recorded.calls[0])
        torch.library.opcheck(original, args)


@pytest.mark.parametrize("name", COMPILED)
def test_fullgraph_of_a_case(name, backend):
    """aot_eager: Dynamo, fake tensors, AOTAutograd, functionalisation; no code generation."""
    torch.compiler.reset()
    against = gate_truth(make_gate_inputs(GATES[name], torch.float32))
    compiled = torch.compile(_function(name), fullgraph=True, backend="aot_eager")
    assert_gate_accurate(run_gate(compiled, against.inputs), against)


def _all_of_them(x, y, gate, logits, scale, weight, present, row_mask):
    x = mmfast.gated_residual(x, y, gate, row_mask=row_mask)
    x = mmfast.fuse([x, y], logits, mode="gmu", present=present)
    out, x = mmfast.modulate(y, scale, residual=x, weight=weight)
    out = mmfast.adaptation_gate(out, x, weight=weight, row_mask=row_mask)
    return mmfast.glu(out, x, "gelu") + mmfast.glu_packed(torch.cat([x, out], -1))


def _problem(B, N, C):
    g = torch.Generator().manual_seed(B * 100 + N)
    x, y = torch.randn(B, N, C, generator=g), torch.randn(B, N, C, generator=g)
    sides = torch.randn(1, generator=g), torch.randn(B, N, 2, generator=g)
    sides += torch.randn(B, C, generator=g), torch.randn(C, generator=g)
    masks = torch.rand(B, 2, generator=g) < 0.7, torch.rand(B, N, generator=g) < 0.7
    return [t.requires_grad_() for t in (x, y, *sides)], masks


def test_fullgraph_dynamic(backend):
    """One graph for all sizes, gradients included, equal to eager, through inductor."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(_all_of_them, fullgraph=True, dynamic=True)
    for sizes in ((4, 9, 16), (3, 40, 24), (5, 7, 33)):  # no size like that of K: it is fixed
        leaves, masks = _problem(*sizes)
        results = []
        for function in (compiled, _all_of_them):
            out = function(*leaves, *masks)
            results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class _Everything(torch.nn.Module):
    def forward(self, x, y, gate, logits, scale, weight, present, row_mask):
        return _all_of_them(x, y, gate, logits, scale, weight, present, row_mask)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, backend):
    leaves, masks = _problem(2, 5, 8)
    leaves = [leaf.detach() for leaf in leaves]
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = ({1: rows}, {1: rows}, None, {1: rows}, None, None, None, {1: rows})
    program = torch.export.export(
        _Everything(), (*leaves, *masks), dynamic_shapes=shapes, strict=strict
    )
    for sizes in ((2, 5, 8), (2, 11, 8)):
        leaves, masks = _problem(*sizes)
        leaves = [leaf.detach() for leaf in leaves]
        got = program.module()(*leaves, *masks)
        torch.testing.assert_close(got, _all_of_them(*leaves, *masks), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoint(compiled, backend):
    torch.compiler.reset()
    leaves, masks = _problem(2, 9, 16)

    def function(*leaves):
        return checkpoint(_all_of_them, *leaves, *masks, use_reentrant=False)

    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    out, plain = function(*leaves), _all_of_them(*leaves, *masks)
    torch.testing.assert_close(out, plain)
    got = torch.autograd.grad(out.sin().sum(), leaves)
    for a, b in zip(got, torch.autograd.grad(plain.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", ["gated_residual", "glu", "fuse", "modulate", "adaptation_gate"])
def test_autocast_takes_the_wider_dtype(op, backend):
    """A float32 stream and a bfloat16 branch, as autocast makes them."""
    stream, branch = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16()
    side = torch.randn(8)
    calls = {
        "gated_residual": lambda x, y: mmfast.gated_residual(x, y, side),
        "glu": lambda x, y: mmfast.glu(x, y),
        "fuse": lambda x, y: mmfast.fuse([x, y], torch.zeros(2), mode="softmax"),
        "modulate": lambda x, y: mmfast.modulate(x, side, residual=y).out,
        "adaptation_gate": lambda x, y: mmfast.adaptation_gate(x, y, weight=side),
    }
    with pytest.raises(TypeError, match="both must match"):
        calls[op](stream, branch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for pair in ((stream, branch), (branch, stream)):
            got = calls[op](*pair)
            assert got.dtype == torch.float32
            assert torch.equal(got, calls[op](*(t.float() for t in pair)))
        both = calls[op](branch, branch)
    assert both.dtype == torch.bfloat16
    leaf = branch.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calls[op](stream, leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", OPCHECKED)
def test_fake_and_meta_tensors(name, backend):
    """Shapes, dtypes and strides are known without computing."""
    inputs = make_gate_inputs(GATES[name], torch.bfloat16)
    expected = inputs.call(_function(name))
    expected = expected if isinstance(expected, tuple) else (expected,)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(leaf) for n, leaf in inputs.leaves.items()}
        kept = dict(inputs.options)
        for option, value in kept.items():
            if isinstance(value, torch.Tensor):
                inputs.options[option] = mode.from_tensor(value)
        got = inputs.call(_function(name), fake)
        inputs.options = kept
    got = got if isinstance(got, tuple) else (got,)
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.stride() == b.stride() or b.numel() == 0
    meta = {n: leaf.to("meta") for n, leaf in inputs.leaves.items()}
    for option, value in kept.items():
        if isinstance(value, torch.Tensor):
            inputs.options[option] = value.to("meta")
    with mmfast.use_backend("auto"):
        on_meta = inputs.call(_function(name), meta)
    on_meta = on_meta[0] if isinstance(on_meta, tuple) else on_meta
    assert on_meta.is_meta
    assert on_meta.shape == expected[0].shape
