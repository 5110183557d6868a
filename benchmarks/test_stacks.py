"""Attention modules and stacks of `mmfast.nn` and torch.nn's as pytest-benchmark groups; see
test_cross_attention.py."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from . import machine
from .problems import DIRECTIONS
from .stacks import CASES, Stack, StackCase, StackProblem, directions_of

_COMPILE = pytest.param("compile", marks=pytest.mark.slow)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", ["eager", "sdpa", _COMPILE, "mmfast"])
@pytest.mark.benchmark(min_rounds=3, max_time=0.3, warmup=False)
def test_stack(
    benchmark: BenchmarkFixture, case: StackCase, dtype: str, direction: str, impl: str
) -> None:
    if direction not in directions_of(case):
        pytest.skip("nothing is learnt from while generating")
    device = machine.device()
    workload = Stack(StackProblem(case, dtype, direction), device)
    run = workload.run(impl)
    workload.check(impl, run)
    benchmark.group = f"{case.op}, {case.name}, {dtype}, {direction}"
    benchmark.extra_info["impl"] = impl
    benchmark(machine.synchronised(run, device))
