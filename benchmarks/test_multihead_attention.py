"""`torch.nn.MultiheadAttention` and its drop-in as pytest-benchmark groups; see
test_cross_attention.py."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from mmfast.testing.cases import Case, performance_cases

from . import machine
from .impls import Problem
from .modules import Module
from .problems import DIRECTIONS

_COMPILE = pytest.param("compile", marks=pytest.mark.slow)


@pytest.mark.parametrize("case", performance_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", ["eager", "sdpa", _COMPILE, "mmfast"])
@pytest.mark.benchmark(min_rounds=3, max_time=0.3, warmup=False)
def test_multihead_attention(
    benchmark: BenchmarkFixture, case: Case, direction: str, impl: str
) -> None:
    device = machine.device()
    workload = Module(Problem(case, "float32", direction), device)
    run = workload.run(impl)
    workload.check(impl, run)
    benchmark.group = f"MultiheadAttention, {case.name}, {direction}"
    benchmark.extra_info["impl"] = impl
    benchmark(machine.synchronised(run, device))
