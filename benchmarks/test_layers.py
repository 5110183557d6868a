"""The gated layers of `mmfast.nn` and transformers' as pytest-benchmark groups; see
test_cross_attention.py."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from . import machine
from .layers import CASES, Layer, LayerCase, LayerProblem, MissingTransformersError
from .problems import DIRECTIONS

_COMPILE = pytest.param("compile", marks=pytest.mark.slow)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", ["eager", "sdpa", _COMPILE, "mmfast"])
@pytest.mark.benchmark(min_rounds=3, max_time=0.3, warmup=False)
def test_layer(benchmark: BenchmarkFixture, case: LayerCase, direction: str, impl: str) -> None:
    device = machine.device()
    try:
        workload = Layer(LayerProblem(case, "float32", direction), device)
    except MissingTransformersError as error:
        pytest.skip(str(error))
    if impl == "sdpa" and impl not in workload.peers:
        pytest.skip("there is no attention in it")
    run = workload.run(impl)
    workload.check(impl, run)
    benchmark.group = f"{case.op}, {case.name}, {direction}"
    benchmark.extra_info["impl"] = impl
    benchmark(machine.synchronised(run, device))
