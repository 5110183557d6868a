"""The gating ops as pytest-benchmark groups, one for each case of their registry; see
test_cross_attention.py."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from mmfast.testing.gate_cases import GateCase, performance_gate_cases

from . import machine
from .gates import Gate, GateProblem, GateRuler
from .problems import DIRECTIONS

_COMPILE = pytest.param("compile", marks=pytest.mark.slow)


@lru_cache(maxsize=1)
def ruler_of(case: GateCase, dtype: str) -> GateRuler:
    return GateRuler(case, getattr(torch, dtype))


@pytest.mark.parametrize("case", performance_gate_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", ["eager", _COMPILE, "mmfast"])
@pytest.mark.benchmark(min_rounds=3, max_time=0.3, warmup=False)
def test_gate(
    benchmark: BenchmarkFixture, case: GateCase, dtype: str, direction: str, impl: str
) -> None:
    device = machine.device()
    workload = Gate(GateProblem(case, dtype, direction), device, ruler_of(case, dtype))
    run = workload.run(impl)
    workload.check(impl, run)
    benchmark.group = f"{case.op}, {case.name}, {dtype}, {direction}"
    benchmark.extra_info["impl"] = impl
    benchmark(machine.synchronised(run, device))
