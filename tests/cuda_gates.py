"""What the tests of the gates' CUDA kernels share: cases of their own, and equal bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_host
import torch

import mmfast
from mmfast.testing.gate_cases import GateCase, make_gate_inputs
from mmfast.testing.gate_tolerance import assert_gate_accurate, gate_truth, run_gate


def check_case(case: GateCase, dtype: torch.dtype, seed: int = 0) -> None:
    """`cuda_host.check_gate` of a case that is not in the registry."""
    inputs = make_gate_inputs(case, dtype)
    against = gate_truth(inputs)
    cuda_host.seed(seed)
    taken = inputs if case.layout != "dense" else inputs.poisoned()
    assert_gate_accurate(run_gate(getattr(mmfast, case.op), taken), against)


def same_bits_whatever_the_schedule(call: Callable[[], Any]) -> None:
    """Warps and lanes take turns in another order each time; the result has the same bits."""
    cuda_host.seed(1)
    first = torch.utils._pytree.tree_leaves(call())
    for seed in (2, 3):
        cuda_host.seed(seed)
        for got, expected in zip(torch.utils._pytree.tree_leaves(call()), first, strict=True):
            assert torch.equal(got, expected)
