"""The Triton kernels in bfloat16, interpreted with bfloat16 put right, under the guard."""

from __future__ import annotations

import pytest
import torch
from test_triton_shared import CASES as SHARED
from test_triton_shared import check as check_shared
from triton_helpers import HAS_TRITON, check_case, requires_triton

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, functional_cases, make_inputs
from mmfast.testing.gate_cases import functional_gate_cases

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton_numerics import (
    bfloat16,  # noqa: F401
    from_bfloat16,
    interpreted,  # noqa: F401
    tensor_cores,
    to_bfloat16,
)

pytestmark = [requires_triton, pytest.mark.usefixtures("bfloat16")]

WIDEST = 256
CASES = (
    "tiny", "one_key", "dense", "big_scores", "scale_negative", "width_17", "width_72",
    "widths_17_80", "empty_keys", "gqa_1", "causal_wide", "mask_dead_rows", "bias_BHNM",
    "bias_1H1M", "bias_11N1", "gate_full_float32", "dropout_gate_bias", "dlse_lens_gate",
    "importance", "weights_mean",
)  # fmt: skip
EACH_GATE_CASE = 30


def _attention_cases():
    for case in functional_cases():
        if max(case.D, case.Dv) <= WIDEST:
            marks = [] if case.name in CASES else [pytest.mark.slow]
            yield pytest.param(case.name, id=case.name, marks=marks)


def _gate_cases():
    ops = ("gated_residual", "glu", "glu_packed", "fuse", "modulate", "adaptation_gate")
    for number, name in enumerate(case for op in ops for case in functional_gate_cases(op)):
        marks = [pytest.mark.slow] if number % EACH_GATE_CASE else []
        yield pytest.param(name, id=name, marks=marks)


@pytest.mark.parametrize("name", list(_attention_cases()))
def test_cross_attention(name):
    """By the ruler, with products as tensor cores make them."""
    inputs = make_inputs(CROSS_ATTENTION[name], torch.bfloat16)
    against = tolerance.truth(inputs)
    with mmfast.use_backend("triton"), tensor_cores():
        results = tolerance.run(mmfast.cross_attention, inputs.poisoned())
    tolerance.assert_accurate(results, against)


@pytest.mark.parametrize("name", [
    "dropout_gate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("split", "results")),
])  # fmt: skip
def test_keys_that_are_the_values(name):
    with tensor_cores():
        check_shared(SHARED[name], torch.bfloat16)


@pytest.mark.parametrize("name", list(_gate_cases()))
def test_gates(name):
    check_case(name, torch.bfloat16)


def test_conversions_are_those_of_torch():
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=g).to(torch.int32)
    halves = (torch.arange(2**16) << 16 | 0x8000).to(torch.int32)  # ties
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-45])
    for x in (bits.view(torch.float32), halves.view(torch.float32), special):
        rounded = torch.from_numpy(to_bfloat16(x.numpy()).view("int16")).view(torch.bfloat16)
        expected = x.to(torch.bfloat16)
        assert torch.equal(rounded.isnan(), x.isnan())
        assert torch.equal(rounded.nan_to_num(1.0), expected.nan_to_num(1.0))
        values = torch.from_numpy(from_bfloat16(to_bfloat16(x.numpy())))
        assert torch.equal(values.nan_to_num(1.0), expected.float().nan_to_num(1.0))
