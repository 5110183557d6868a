"""`pytest benchmarks/`: every case of the registry as a pytest-benchmark group.

The implementations of a group are timed one after the other, not in turns as `python -m benchmarks`
does: good for `--benchmark-compare` with an earlier run, less so for ratios on a busy machine.
`-m ""` adds torch.compile.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from mmfast.testing.cases import CROSS_ATTENTION, Case, performance_cases

from . import machine
from .impls import Problem
from .problems import DIRECTIONS
from .workloads import Attention, Ruler

_COMPILE = pytest.param("compile", marks=pytest.mark.slow)


@lru_cache(maxsize=1)
def ruler_of(case_name: str, dtype: str) -> Ruler:
    return Ruler(CROSS_ATTENTION[case_name], getattr(torch, dtype))


@pytest.mark.parametrize("case", performance_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", ["eager", "sdpa", _COMPILE, "mmfast"])
@pytest.mark.benchmark(min_rounds=3, max_time=0.3, warmup=False)
def test_cross_attention(
    benchmark: BenchmarkFixture, case: Case, dtype: str, direction: str, impl: str
) -> None:
    device = machine.device()
    if dtype == "bfloat16" and not machine.bf16_is_fast(device):
        pytest.skip("this processor has no instructions for bfloat16 products")
    workload = Attention(Problem(case, dtype, direction), device, ruler_of(case.name, dtype))
    run = workload.run(impl)
    workload.check(impl, run)
    benchmark.group = f"{case.name}, {dtype}, {direction}"
    benchmark.extra_info["impl"] = impl
    benchmark(machine.synchronised(run, device))
