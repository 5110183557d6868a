"""Derivatives of the gating ops: gradcheck, what is saved, transforms, determinism."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.autograd import forward_ad

import mmfast
from mmfast.ops import _fused
from mmfast.testing.gate_cases import GATES, functional_gate_cases, make_gate_inputs
from mmfast.testing.gate_tolerance import run_gate

OPS = ("gated_residual", "glu", "glu_packed", "fuse", "modulate", "adaptation_gate")


def _checkable(name):
    """Small and smooth: finite differences cost two calls an element, and cross no kink."""
    case = GATES[name]
    small = 0 < math.prod(case.shape) * max(case.K, 1) <= 2400
    kinks = case.activation == "relu" or case.special in ("infinite_logits", "zero_rows")
    loud = case.magnitude > 1 or case.special == "large_sides" or case.beta == 50.0
    return small and not kinks and not loud and case.layout == "dense" and case.side_dtype == "same"


def _tiny(name, dtype=torch.float64):
    """A case at gradcheck's size: 2 x 2 x 3 or so, with every form that it has."""
    case = GATES[name]
    shape = (*(min(size, 2) for size in case.shape[:-1]), min(case.shape[-1], 3))
    return make_gate_inputs(dataclasses.replace(case, shape=shape), dtype)


GRADCHECKED = [name for op in OPS for name in functional_gate_cases(op) if _checkable(name)]
ONE_EACH = [
    "gated_residual-mask_BN_BC", "glu-gelu", "glu_packed-silu", "fuse-softmax_BNK_present",
    "fuse-gmu_BNKC_present", "fuse-pair_BNC_present", "modulate-layer_all_BC", "modulate-rms_zero",
    "modulate-film_BNC", "adaptation_gate-mask_BN",
]  # fmt: skip


def _function(name):
    return getattr(mmfast, GATES[name].op)


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(name, backend):
    inputs = _tiny(name)
    names = list(inputs.leaves)

    def function(*leaves):
        output = inputs.call(_function(name), dict(zip(names, leaves, strict=True)))
        return tuple(output) if isinstance(output, tuple) else output

    leaves = [leaf.clone().requires_grad_() for leaf in inputs.leaves.values()]
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", ONE_EACH)
def test_each_gradient_alone_is_the_same(name, backend):
    """Every subset that asks for one gradient: the same bits as when all are asked for."""
    inputs = make_gate_inputs(GATES[name], torch.float32)
    everything = run_gate(_function(name), inputs)
    for wanted in inputs.leaves:
        leaves = {n: leaf.detach().clone() for n, leaf in inputs.leaves.items()}
        leaves[wanted].requires_grad_()
        output = inputs.call(_function(name), leaves)
        parts = output if isinstance(output, tuple) else (output,)
        incoming = [inputs.incoming[n] for n in ("out", "h")[: len(parts)]]
        used = [(p, g) for p, g in zip(parts, incoming, strict=True) if p.requires_grad]
        (grad,) = torch.autograd.grad([p for p, _ in used], [leaves[wanted]], [g for _, g in used])
        assert torch.equal(grad, everything[f"d{wanted}"]), wanted


@pytest.mark.parametrize("name", ONE_EACH)
def test_twice_gives_the_same_bits_and_nothing_is_written_to(name, backend):
    inputs = make_gate_inputs(GATES[name], torch.float32)
    leaves = {n: leaf.detach().clone().requires_grad_() for n, leaf in inputs.leaves.items()}
    before = {n: leaf.detach().clone() for n, leaf in leaves.items()}
    output = inputs.call(_function(name), leaves)
    parts = output if isinstance(output, tuple) else (output,)
    incoming = [inputs.incoming[n].clone() for n in ("out", "h")[: len(parts)]]
    kept = [g.clone() for g in incoming]
    first = torch.autograd.grad(parts, list(leaves.values()), incoming, retain_graph=True)
    second = torch.autograd.grad(parts, list(leaves.values()), incoming)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(leaf, before[n]) for n, leaf in leaves.items())
    assert all(torch.equal(a, b) for a, b in zip(kept, incoming, strict=True))


@pytest.mark.usefixtures("compiled_library")
@pytest.mark.parametrize(
    "name",
    ["gated_residual-many_rows", "gated_residual-many_rows_channel", "gated_residual-many_items",
     "fuse-softmax_rows", "fuse-gmu_rows_channels", "modulate-layer_many_rows",
     "modulate-rms_many_items", "adaptation_gate-many_rows", "glu-many_rows"],
)  # fmt: skip
def test_the_number_of_threads_changes_no_bit(name, gate_implementation):
    if gate_implementation.backend == "reference":
        pytest.skip("the reference sums as torch does: the promise is that of the kernels")
    inputs = make_gate_inputs(GATES[name], torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_gate(_function(name), inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other)


@pytest.mark.parametrize("name", ONE_EACH)
def test_items_are_independent(name, backend):
    """A NaN in the last item reaches no other."""
    inputs = make_gate_inputs(GATES[name], torch.float32)
    clean = run_gate(_function(name), inputs)
    leaves = dict(inputs.leaves)
    for leaf in leaves:
        if leaves[leaf].shape == inputs.case.shape:
            leaves[leaf] = leaves[leaf].clone()
            leaves[leaf][-1] = float("nan")
    spoilt = inputs.call(_function(name), leaves)
    spoilt = spoilt[0] if isinstance(spoilt, tuple) else spoilt
    assert torch.equal(spoilt[:-1], clean["out"][:-1])


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_gradient_that_is_expanded(name, backend):
    """`out.sum().backward()` sends in a gradient with stride 0."""
    inputs = make_gate_inputs(GATES[name], torch.float32)
    grads = []
    for form in ("expanded", "whole"):
        leaves = {n: leaf.detach().requires_grad_() for n, leaf in inputs.leaves.items()}
        out = inputs.call(_function(name), leaves)
        out = out[0] if isinstance(out, tuple) else out
        dout = torch.ones((), dtype=out.dtype).expand(out.shape)
        dout = dout if form == "expanded" else dout.contiguous()
        grads.append(torch.autograd.grad(out, list(leaves.values()), dout))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_modulate_with_one_gradient_of_two(backend):
    """Only h, or only out, goes on into the loss."""
    inputs = make_gate_inputs(GATES["modulate-layer_all_BC"], torch.float32)
    for part in (0, 1):
        leaves = {n: leaf.detach().requires_grad_() for n, leaf in inputs.leaves.items()}
        expected = {n: leaf.detach().requires_grad_() for n, leaf in inputs.leaves.items()}
        inputs.call(mmfast.modulate, leaves)[part].square().sum().backward()
        inputs.call(mmfast.reference.modulate, expected)[part].square().sum().backward()
        for name, leaf in leaves.items():
            want = expected[name].grad
            if want is None or leaf.grad is None:
                assert leaf.grad is None or not leaf.grad.any(), name
                assert want is None or not want.any(), name
            else:
                torch.testing.assert_close(leaf.grad, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("compiled_library")
@pytest.mark.parametrize("name", ONE_EACH)
def test_only_inputs_are_saved(name):
    """The tensors kept for the backward share the memory of the inputs (and of h, a result)."""
    inputs = make_gate_inputs(GATES[name], torch.float32)
    leaves = {n: leaf.detach().requires_grad_() for n, leaf in inputs.leaves.items()}
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
    known |= {
        option.untyped_storage().data_ptr()
        for option in inputs.options.values()
        if isinstance(option, torch.Tensor)
    }
    saved: list[torch.Tensor] = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with (
        mmfast.use_backend("cpu"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        output = inputs.call(_function(name), leaves)
    if isinstance(output, tuple):
        known |= {part.untyped_storage().data_ptr() for part in output}
    assert saved
    assert all(t.untyped_storage().data_ptr() in known or t.numel() == 0 for t in saved)


# --- transforms --------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiled_library")
@pytest.mark.parametrize("name", ONE_EACH)
def test_double_backward_is_refused_in_words(name):
    inputs = _tiny(name)
    leaves = {n: leaf.clone().requires_grad_() for n, leaf in inputs.leaves.items()}
    with mmfast.use_backend("cpu"):
        output = inputs.call(_function(name), leaves)
        out = output[0] if isinstance(output, tuple) else output
        grads = torch.autograd.grad(
            out.square().sum(), list(leaves.values()), create_graph=True, allow_unused=True
        )
        with pytest.raises(RuntimeError, match="the gradient of a gradient is not offered by this"):
            sum(g.square().sum() for g in grads if g is not None).backward()


@pytest.mark.parametrize("name", ONE_EACH)
def test_double_backward_on_the_reference(name):
    inputs = _tiny(name)
    names = list(inputs.leaves)

    def function(*leaves):
        output = inputs.call(_function(name), dict(zip(names, leaves, strict=True)))
        return output[0] if isinstance(output, tuple) else output

    leaves = [leaf.clone().requires_grad_() for leaf in inputs.leaves.values()]
    with mmfast.use_backend("reference"):
        assert torch.autograd.gradgradcheck(function, leaves, atol=1e-5)


@pytest.mark.parametrize("name", ONE_EACH)
def test_forward_mode(name):
    """Goes to the reference by itself, and is its derivative."""
    inputs = _tiny(name)
    tangents = {n: torch.randn_like(leaf) for n, leaf in inputs.leaves.items()}

    def derivative(function):
        with forward_ad.dual_level():
            dual = {n: forward_ad.make_dual(leaf, tangents[n]) for n, leaf in inputs.leaves.items()}
            output = inputs.call(function, dual)
            out = output[0] if isinstance(output, tuple) else output
            return forward_ad.unpack_dual(out).tangent

    expected = derivative(getattr(mmfast.reference, GATES[name].op))
    assert torch.equal(derivative(_function(name)), expected)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("name", ONE_EACH)
def test_torch_func_grad(name):
    inputs = _tiny(name)

    def loss(leaves, function):
        output = inputs.call(function, leaves)
        return (output[0] if isinstance(output, tuple) else output).square().sum()

    got = torch.func.grad(loss)(inputs.leaves, _function(name))
    expected = torch.func.grad(loss)(inputs.leaves, getattr(mmfast.reference, GATES[name].op))
    for leaf, grad in got.items():
        torch.testing.assert_close(grad, expected[leaf])


@pytest.mark.parametrize("name", ONE_EACH)
def test_vmap(name, backend):
    """Over all leaves at once, as a loop would do it."""
    count = 3
    several = [_tiny(name) for _ in range(count)]
    for index, inputs in enumerate(several):
        for leaf in inputs.leaves.values():
            leaf.add_(0.1 * index)
    stacked = {n: torch.stack([i.leaves[n] for i in several]) for n in several[0].leaves}

    def one(leaves):
        output = several[0].call(_function(name), leaves)
        return output[0] if isinstance(output, tuple) else output

    got = torch.func.vmap(one)(stacked)
    expected = torch.stack([one(inputs.leaves) for inputs in several])
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("compiled_library")
@pytest.mark.parametrize("name", ONE_EACH)
def test_vectorised_gradients(name):
    """`is_grads_batched` goes through torch's older vmap, which knows no lists of results."""
    inputs = _tiny(name)
    if GATES[name].op == "fuse":
        x = inputs.leaves["x0"].requires_grad_()
        with mmfast.use_backend("cpu"):
            out = inputs.call(mmfast.fuse)
            with pytest.raises(RuntimeError, match="Batching rule not implemented"):
                torch.autograd.grad(out, x, torch.stack([out] * 3), is_grads_batched=True)
        return
    with mmfast.use_backend("cpu"):
        leaves = {n: leaf.clone().requires_grad_() for n, leaf in inputs.leaves.items()}
        output = inputs.call(_function(name), leaves)
        out = output[0] if isinstance(output, tuple) else output
        many = torch.randn(3, *out.shape, dtype=out.dtype)
        targets = list(leaves.values())
        got = torch.autograd.grad(out, targets, many, is_grads_batched=True, retain_graph=True)
        for index in range(3):
            one = torch.autograd.grad(out, targets, many[index], retain_graph=True)
            for batched, single in zip(got, one, strict=True):
                torch.testing.assert_close(batched[index], single)


@pytest.mark.usefixtures("compiled_library")
def test_inference_mode_and_subclasses():
    """Tensors of inference mode take the short way; subclasses go through torch's dispatcher."""
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    expected = mmfast.glu(x, y)
    with torch.inference_mode():
        a, b = x.clone(), y.clone()
        assert torch.equal(mmfast.glu(a, b), expected)
        assert _fused.quick("glu", a, b) is not None
    assert _fused.quick("glu", x, y) is not None

    class Named(torch.Tensor):
        pass

    named = x.as_subclass(Named)
    assert _fused.quick("glu", named, y) is None
    assert torch.equal(mmfast.glu(named, y).as_subclass(torch.Tensor), expected)
    assert _fused.quick("glu", x.transpose(0, 1), y) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _fused.quick("glu", x, y) is None
    with mmfast.use_backend("reference"):
        assert _fused.quick("glu", x, y) is None
