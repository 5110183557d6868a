"""The ruler of the gates measures: it passes what is right and rejects small, typical mistakes."""

from __future__ import annotations

import pytest
import torch

from mmfast import reference
from mmfast.testing.gate_cases import GATES, make_gate_inputs
from mmfast.testing.gate_tolerance import assert_gate_accurate, gate_truth, run_gate


def _other_gelu(a, b, activation):
    return reference.glu(a, b, "gelu_tanh")


def _stale_gate(x, y, gate, **options):
    return reference.gated_residual(x, y, gate * (1 + 1e-3), **options)


def _last_row_lost(x, y, gate, **options):
    keep = torch.ones_like(y)
    keep[:, -1] = 0
    return reference.gated_residual(x, y * keep, gate, **options)


def _no_gradient_of_the_gate(x, y, gate, **options):
    return reference.gated_residual(x, y, gate.detach() + 0 * gate, **options)


def _gate_rounded(x, y, gate, **options):
    """As a kernel that keeps tanh(gate) in bfloat16."""
    tanh = torch.tanh(gate).bfloat16().float()
    return reference.gated_residual(x, y, torch.atanh(tanh) + 0 * gate, **options)


def _absent_count(features, logits, *, mode, present):
    """The absent take a share of the weight."""
    clean = [torch.where(present[:, k, None, None], x, 0.0) for k, x in enumerate(features)]
    return reference.fuse(clean, logits, mode=mode)


def _scale_without_one(x, scale, shift, **options):
    return reference.modulate(x, scale - 1, shift, **options)


def _unbiased(x, scale, shift, **options):
    """The variance of a sample: C - 1 instead of C."""
    C = x.shape[-1]
    u = (x - x.mean(-1, keepdim=True)) / x.var(-1, keepdim=True).add(options["eps"]).sqrt()
    assert C > 1
    return u * (1 + scale[:, None]) + shift[:, None]


def _never_clipped(z, h, *, beta, weight, bias, eps, **options):
    alpha = beta * z.norm(dim=-1, keepdim=True) / h.norm(dim=-1, keepdim=True)
    return reference.adaptation_gate(z, alpha * h, beta=1e9, weight=weight, bias=bias, eps=eps)


def _constant_alpha(z, h, *, beta, weight, bias, eps, **options):
    """The gradient through alpha is forgotten."""
    ratio = beta * z.norm(dim=-1, keepdim=True) / h.norm(dim=-1, keepdim=True)
    moved = ratio.clamp(max=1.0).detach() * h
    return reference.adaptation_gate(z, moved, beta=1e9, weight=weight, bias=bias, eps=eps)


FAULTS = [
    ("glu-gelu", _other_gelu),
    ("gated_residual-tanh_C", _stale_gate),
    ("gated_residual-tanh_C", _last_row_lost),
    ("gated_residual-tanh_C", _no_gradient_of_the_gate),
    ("gated_residual-tanh_C", _gate_rounded),
    ("fuse-softmax_BK_present", _absent_count),
    ("modulate-layer_BC", _scale_without_one),
    ("modulate-layer_BC", _unbiased),
    ("adaptation_gate-beta_1.3", _never_clipped),
    ("adaptation_gate-beta_0.7", _constant_alpha),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[fault.__name__ for _, fault in FAULTS])
def test_a_mistake_is_rejected(name, fault):
    against = gate_truth(make_gate_inputs(GATES[name], torch.float32))
    right = run_gate(getattr(reference, GATES[name].op), against.inputs)
    assert_gate_accurate(right, against)
    with pytest.raises(AssertionError):
        assert_gate_accurate(run_gate(fault, against.inputs), against)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nan_and_what_is_missing_fail(dtype):
    against = gate_truth(make_gate_inputs(GATES["glu-silu"], dtype))
    results = run_gate(reference.glu, against.inputs)
    for name in results:
        spoilt = dict(results)
        spoilt[name] = results[name].clone()
        spoilt[name][0, 0, 0] = float("nan")
        with pytest.raises(AssertionError):
            assert_gate_accurate(spoilt, against)
        del spoilt[name]
        with pytest.raises(AssertionError):
            assert_gate_accurate(spoilt, against)


def test_masked_gradients_must_be_exactly_zero():
    against = gate_truth(make_gate_inputs(GATES["gated_residual-mask_BN_C"], torch.float32))
    results = run_gate(reference.gated_residual, against.inputs)
    masked = ~against.inputs.options["row_mask"]
    results["dy"] = results["dy"].masked_fill(masked.unsqueeze(-1), 1e-12)
    with pytest.raises(AssertionError, match="not exactly 0 where masked"):
        assert_gate_accurate(results, against)
