"""The suite tests itself, the part of the gates: refusals, bandwidth, the summary, the plan."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast.testing import gate_eager
from mmfast.testing.gate_cases import GateCase

from . import gates, layers, machine, memory, results
from .gates import Gate, GateProblem, GateRuler
from .impls import IMPLS
from .layers import Layer, LayerProblem
from .measuring import Measuring
from .memory import ResidentPeak
from .problems import DIRECTIONS, FORWARD, FORWARD_BACKWARD
from .profiles import GATES, PROFILES
from .table import ASKED, Table
from .timing import Effort
from .workloads import WrongResultError, to_job

CPU = torch.device("cpu")
SMOKE = PROFILES["smoke"].gates.cases["float32"]
ROWS = dataclasses.replace(GATES["tanh_gate_rows_short"], shape=(2, 40, 16))
MLP, BLOCK = layers.CASES[0], layers.CASES[-1]
SMALL_MLP = dataclasses.replace(MLP, N=3, width=16, hidden=24)
SMALL_BLOCK = dataclasses.replace(
    BLOCK, B=2, N=3, width=16, hidden=24, heads=4, kv_heads=2, lens=(7, 3)
)


# --- right before timed ---------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.name)
def test_the_implementations_are_right(case: GateCase, dtype: str, direction: str) -> None:
    workload = Gate(GateProblem(case, dtype, direction), CPU)
    for impl in ("eager", "mmfast"):
        workload.check(impl, workload.run(impl))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["tanh_gate_rows", "gmu", "softmax_mix_3", "ada_layer_norm_zero"])
def test_a_case_that_is_judged_in_part(kind: str, dtype: str) -> None:
    case = dataclasses.replace(GATES[f"{kind}_short"], shape=(2, 40, 16))
    ruler = GateRuler(case, getattr(torch, dtype), most=200)
    assert ruler.rows is not None and ruler.rows[[0, -1]].tolist() == [0, 39]
    for direction in DIRECTIONS:
        workload = Gate(GateProblem(case, dtype, direction), CPU, ruler)
        before = [x.clone() for x in workload._douts]
        for impl in ("mmfast", "eager"):
            workload.check(impl, workload.run(impl))
        assert all(torch.equal(a, b) for a, b in zip(before, workload._douts))


def wrong_value(x: Tensor, y: Tensor, gate: Tensor, **options: Any) -> Tensor:
    return gate_eager.gated_residual(x, y * 1.01, gate, **options)


def wrong_gate_gradient(x: Tensor, y: Tensor, gate: Tensor, **options: Any) -> Tensor:
    gate = gate * 0.95 + gate.detach() * 0.05
    return gate_eager.gated_residual(x, y, gate, **options)


def leaks(x: Tensor, y: Tensor, gate: Tensor, **options: Any) -> Tensor:
    """The rows that are masked get a gradient of their branch."""
    return gate_eager.gated_residual(x, y, gate, **options) + 1e-6 * (y - y.detach())


def not_finite(x: Tensor, y: Tensor, gate: Tensor, **options: Any) -> Tensor:
    return gate_eager.gated_residual(x, y, gate, **options) / torch.zeros(())


def forgets_a_row(x: Tensor, y: Tensor, gate: Tensor, **options: Any) -> Tensor:
    out = gate_eager.gated_residual(x, y, gate, **options)
    live = torch.ones((*x.shape[:-1], 1))
    live[0, 1] = 0  # which the ruler in part does not look at
    return out * live


@pytest.mark.parametrize("most", [10**6, 200])
@pytest.mark.parametrize(
    "planted", [wrong_value, wrong_gate_gradient, leaks, not_finite, forgets_a_row]
)
def test_a_wrong_kernel_is_not_timed(
    planted: Callable[..., Tensor], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruler = GateRuler(ROWS, torch.float32, most)
    assert ruler.rows is None or 1 not in ruler.rows
    monkeypatch.setitem(gates.FUSED, "gated_residual", planted)
    table = Table(PROFILES["smoke"], CPU, ResidentPeak(enabled=False), lambda: 1.0)
    table.measure(
        Gate(GateProblem(ROWS, "float32", FORWARD_BACKWARD), CPU, ruler), impls=("eager", "mmfast")
    )
    assert table.rows == []
    assert len(table.refused) == 1
    assert "refused" in table.left_out[0]["why"]


# --- bandwidth and memory -------------------------------------------------------------------


def test_the_bytes_that_must_move() -> None:
    case = GateCase("glu", "x", (2, 8, 32), "silu")
    forward, both = (GateProblem(case, "bfloat16", direction) for direction in DIRECTIONS)
    assert (forward.bytes(), both.bytes()) == (3 * 512 * 2, 8 * 512 * 2)
    assert (Gate(forward, CPU).clone().units, Gate(both, CPU).clone().units) == (1.5, 4.0)


def test_what_is_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Gate(GateProblem(GateCase("glu", "x", (2, 8, 32)), "float32", FORWARD_BACKWARD), CPU)
    for cache, beyond in ((3 * 512 * 2, True), (3 * 512 * 2 + 1, False)):  # half of the forward
        monkeypatch.setattr(machine, "last_level_cache", lambda on, cache=cache: cache)
        assert workload.clone().beyond_cache is beyond


def test_the_copy_is_timed_beside_and_is_no_row() -> None:
    table = Table(PROFILES["smoke"], CPU, ResidentPeak(enabled=False), lambda: 1.0)
    workload = Gate(GateProblem(SMOKE[0], "float32", FORWARD), CPU)
    effort = Effort(budget_s=0.0, min_rounds=2, max_rounds=2, sample_s=0.0)
    table.measure(workload, impls=("eager", "mmfast"), effort=effort, memory="")
    assert [row["impl"] for row in table.rows] == ["eager", "mmfast"]
    for row in table.rows:
        assert row["pct_of_clone"] > 0.0 and row["beyond_cache"] is False
        assert row["peak_extra_bytes"] is None
    table.measure(workload, impls=("eager", "mmfast"), effort=effort, memory=ASKED)
    assert all(row["peak_extra_bytes"] > 0 for row in table.rows[2:])


@pytest.mark.skipif(not memory._can_reset_peak(), reason="the system cannot reset its mark")
def test_touched_memory_of_a_gate() -> None:
    case = GateCase("glu", "x", (4, 1024, 1024), "silu")
    job = to_job(Gate(GateProblem(case, "float32", FORWARD), CPU), "eager")
    with ResidentPeak() as resident:
        touched = resident.measure(job)
    result = case.elements * 4
    assert touched is not None
    assert 1.9 * result < touched < 3 * result  # the activation and the product


@pytest.mark.parametrize("name", ["ada_layer_norm_zero_wide", "softmax_mix_3_long"])
def test_a_problem_survives_json(name: str) -> None:
    problem = GateProblem(GATES[name], "bfloat16", FORWARD_BACKWARD)
    assert GateProblem.from_json(json.loads(json.dumps(problem.to_json()))) == problem


# --- results --------------------------------------------------------------------------------


def rows_of(op: str, case: str, times: dict[str, float], copied: results.Copied) -> Any:
    group = {
        "op": op, "case": case, "ragged": False, "dtype": "float32", "direction": FORWARD,
    }  # fmt: skip
    return results.group_rows(group, {k: [v * 1e-3] for k, v in times.items()}, {}, None, copied)


def test_the_summary_of_gates() -> None:
    rows = [
        *rows_of("glu", "swiglu_short", {"eager": 8.0, "mmfast": 4.0}, results.Copied(3e-3, False)),
        *rows_of(
            "glu",
            "swiglu_long",
            {"eager": 8.0, "compile": 3.0, "mmfast": 1.0},
            results.Copied(9e-4, True),
        ),
        *rows_of("fuse", "gmu_long", {"eager": 4.0, "mmfast": 8.0}, results.Copied(4e-3, True)),
    ]
    by_op = {entry["op"]: entry for entry in results.summarise(rows)}
    assert list(by_op) == ["glu", "fuse", results.ALL_GATES]
    glu, total = by_op["glu"], by_op[results.ALL_GATES]
    assert (glu["cases"], glu["compiled_cases"]) == (2, 1)
    assert glu["mean_vs_eager"] == pytest.approx(4.0)
    assert glu["mean_vs_compile"] == pytest.approx(3.0)
    assert glu["mean_vs_best_peer"] == pytest.approx(math.sqrt(6.0))
    assert (glu["worst_case"], glu["worst_vs_best_peer"]) == ("swiglu_short", pytest.approx(2.0))
    assert glu["mean_pct_of_clone"] == pytest.approx(90.0)  # of the case beyond the cache alone
    assert (total["cases"], total["worst_case"]) == (3, "gmu_long")
    assert total["mean_vs_eager"] == pytest.approx(2.0)
    assert total["mean_pct_of_clone"] == pytest.approx(math.sqrt(90.0 * 50.0))
    assert total["worst_pct_of_clone"] == pytest.approx(50.0)
    kinds = results.by_kind(rows, dtype="float32", direction=FORWARD)
    assert {kind: entry["cases"] for kind, entry in kinds.items()} == {"swiglu": 2, "gmu": 1}
    assert by_op["fuse"]["mean_vs_compile"] is None


# --- the plan -------------------------------------------------------------------------------


def test_every_kind_is_measured_and_every_op_compiled() -> None:
    kinds = {case.tags[1] for case in GATES.values()}
    ops = {case.op for case in GATES.values()}
    for name in ("quick", "full"):
        plan = PROFILES[name].gates
        for dtype in ("float32", "bfloat16"):
            assert {case.tags[1] for case in plan.cases[dtype]} == kinds
            assert len(set(plan.cases[dtype])) == len(plan.cases[dtype])
        compiled = [case for case in plan.cases["float32"] if case.name in plan.thorough]
        assert {case.op for case in compiled} == ops
        assert len(compiled) == len(plan.thorough)


def test_a_run_of_one_part_has_the_rest_not() -> None:
    plan = dataclasses.replace(
        PROFILES["smoke"].gates, cases={"float32": SMOKE[:1], "bfloat16": ()}
    )
    profile = dataclasses.replace(
        PROFILES["smoke"], gates=dataclasses.replace(plan, layers=(), thorough=frozenset())
    )
    ticks: list[float] = []
    measuring = Measuring(
        profile,
        CPU,
        ("float32",),
        ("gates",),
        lambda: 1.0,
        lambda what, weight: ticks.append(weight),
    )
    measuring.run()
    assert {row["op"] for row in measuring.rows} == {SMOKE[0].op}
    assert sum(ticks) == measuring.total
    assert {row["impl"] for row in measuring.rows} < set(IMPLS)
    assert any("gates in bfloat16" in entry["what"] for entry in measuring.left_out)


# --- layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", [SMALL_MLP, SMALL_BLOCK], ids=lambda case: case.op)
def test_the_layers_are_right(case: layers.LayerCase, direction: str) -> None:
    pytest.importorskip("transformers")
    workload = Layer(LayerProblem(case, "float32", direction), CPU)
    for impl in (*workload.peers, "mmfast"):
        workload.check(impl, workload.run(impl))
    out, *grads = workload.run("mmfast")()
    assert len(grads) == (0 if direction == FORWARD else len(workload._inputs) + len(
        list(workload._mmfast.parameters())))  # fmt: skip
    with pytest.raises(WrongResultError, match="result 0"):
        workload.check("mmfast", lambda: (out * 1.01, *grads))


def test_attention_of_the_peers_is_what_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    workload = Layer(LayerProblem(SMALL_BLOCK, "float32", FORWARD), CPU)
    calls: list[str] = []
    usual = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append("sdpa")
        return usual(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    eager, sdpa = workload.run("eager"), workload.run("sdpa")
    eager()
    assert calls == []
    sdpa()
    assert calls == ["sdpa"]


def test_without_transformers_the_layers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(model: str) -> Any:
        raise layers.MissingTransformersError("no transformers; pip install transformers")

    monkeypatch.setattr(layers, "transformers_layers", missing)
    plan = dataclasses.replace(
        PROFILES["smoke"].gates, cases={"float32": (), "bfloat16": ()}, layers=(SMALL_MLP,)
    )
    profile = dataclasses.replace(PROFILES["smoke"], gates=plan)
    measuring = Measuring(
        profile, CPU, ("float32",), ("gates",), lambda: 1.0, lambda what, weight: None
    )
    measuring.run()
    assert measuring.rows == []
    assert sum("pip install transformers" in entry["why"] for entry in measuring.left_out) == 2
