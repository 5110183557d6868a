"""What the tests on a GPU rely on, as far as it can be seen without one."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import moved, on_device, seeds_of_the_cpu, some_heads

from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, LAYOUTS, Case, make_inputs
from mmfast.testing.gate_cases import GATES, make_gate_inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [f"layout_{layout}" for layout in LAYOUTS])
def test_moved_tensors_lie_in_memory_as_before(name):
    for tensor in (made := make_inputs(CROSS_ATTENTION[name])).q, made.k, made.v:
        copy = moved(tensor, CPU)
        assert torch.equal(copy, tensor)
        assert copy.stride() == tensor.stride()
        assert copy.storage_offset() == tensor.storage_offset()
        assert copy.data_ptr() != tensor.data_ptr()


def test_every_tensor_is_moved():
    meta = torch.device("meta")
    inputs = on_device(make_inputs(CROSS_ATTENTION["results_everything"]), meta)
    tensors = [v for v in (*vars(inputs).values(), *inputs.options.values()) if torch.is_tensor(v)]
    assert len(tensors) == 12
    assert all(tensor.device == meta for tensor in tensors)
    gate = on_device(make_gate_inputs(GATES["gated_residual-same_4d"]), meta)
    for group in (gate.leaves, gate.options, gate.incoming):
        assert all(v.device == meta for v in group.values() if torch.is_tensor(v))


def test_seeds_are_drawn_on_the_cpu_and_nothing_stays_patched():
    draw = torch.randint
    torch.manual_seed(4)
    expected = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    torch.manual_seed(4)
    with seeds_of_the_cpu():
        got = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=CPU)
        moved_on = torch.randint(0, 9, (1,), device="meta")
    assert torch.equal(got, expected)
    assert moved_on.is_meta
    assert torch.randint is draw


def test_heads_are_independent():
    inputs = make_inputs(Case("heads", 2, 5, 9, 24, 16, layout="bnhd", kv_lens=(24, 11)))
    whole, part = tolerance.truth(inputs), tolerance.truth(some_heads(inputs, (0, 4)))
    for name, exact in part.exact.items():
        torch.testing.assert_close(exact, whole.exact[name][:, [0, 4]])
