"""The suite tests itself, the part of modules, stacks and plans: twins, refusals, the report."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from . import measuring, plans, report, results
from .measuring import Measuring
from .problems import FORWARD
from .profiles import PROFILES
from .stacks import ALL_STACKS, CASES, OPS, Stack, StackCase, StackProblem, directions_of
from .terminal import plans_line, sections
from .workloads import WrongResultError

CPU = torch.device("cpu")
_KINDS = {(case.op, case.ours): case for case in CASES}
SMALL = [
    dataclasses.replace(
        case, B=3, N=3, M=7, width=32, heads=4, context_width=32 if case.hidden else 40,
        hidden=48 if case.hidden else 0, layers=min(case.layers, 2),
        lens=(7, 4, 1) if case.lens else (),
    )
    for case in _KINDS.values()
]  # fmt: skip
"""One of each op and class."""
PACKED = dataclasses.replace(SMALL[1], context_width=32)
"""torch.nn keeps the three projections of this one in one tensor, CrossModalAttention never."""


def test_every_op_has_a_case() -> None:
    assert {case.op for case in CASES} == set(OPS)
    assert len({case.name for case in CASES}) == len(CASES)
    for profile in PROFILES.values():
        for dtype in ("float32", "bfloat16"):
            assert {case.op for case in profile.stacks.cases[dtype]} == set(OPS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*SMALL, PACKED], ids=lambda case: case.name)
def test_the_twins_are_right(case: StackCase, dtype: str) -> None:
    for direction in directions_of(case):
        workload = Stack(StackProblem(case, dtype, direction), CPU)
        for impl in ("eager", "sdpa", "mmfast"):
            workload.check(impl, workload.run(impl))


@pytest.mark.parametrize("case", [*SMALL, PACKED], ids=lambda case: case.name)
def test_a_wrong_stack_is_not_timed(case: StackCase) -> None:
    workload = Stack(StackProblem(case, "float32", directions_of(case)[-1]), CPU)
    out, *grads = workload.run("mmfast")()
    with pytest.raises(WrongResultError, match="result 0"):
        workload.check("mmfast", lambda: (out * 1.001, *grads))
    for index in range(len(grads)):
        wrong = list(grads)
        wrong[index] = wrong[index] * 1.01 + 1e-3
        with pytest.raises(WrongResultError, match=r"result [1-9]"):
            workload.check("mmfast", lambda wrong=wrong: (out, *wrong))


def some_plans() -> dict[str, Any]:
    rows = plans.measure("smoke", CPU, ("float32",))
    return {"rows": rows, "summary": plans.summary(rows)}


def test_the_report_has_stacks_and_plans() -> None:
    rows = [
        row
        for case in CASES
        for row in results.group_rows(
            StackProblem(case, "float32", FORWARD).group(case.op),
            {"eager": [3e-3], "sdpa": [2e-3], "mmfast": [1e-3]},
            {},
            None,
        )
    ]
    assert [(section, len(found)) for section, _, _, found in sections(rows)] == [
        (ALL_STACKS, len(rows))
    ]
    found = some_plans()
    page = report.render(
        {
            "machine": {**dict.fromkeys(results.MACHINE, "x"), "started": "now"},
            "rows": rows,
            "plans": found,
            "summary": results.summarise(rows),
            "left_out": [],
            "profile": "smoke",
        },
        {"plans": b"png", "ratios_modules_and_stacks_float32": b"png"},
    )
    assert page.count("<img") == 2
    assert plans_line(found)[1:] in page
    assert all(case.name in page for case in CASES)


def test_without_plans_the_report_says_nothing_of_them() -> None:
    assert plans_line(None) == plans_line({"rows": [], "summary": {"problems": 0}}) == ""


@pytest.mark.parametrize("fails", [False, True])
def test_plans_that_were_not_measured_are_named(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any) -> list[dict[str, Any]]:
        if fails:
            raise WrongResultError("plan absorbed: off by 7")
        return []

    monkeypatch.setattr(measuring.plans, "measure", measure)
    smoke = PROFILES["smoke"]
    run = Measuring(smoke, CPU, ("float32",), ("plans",), lambda: 1.0, lambda *_: None)
    run.run()
    assert run.plans == []
    assert len(run.left_out) == 1 and "of the grid" in run.left_out[0]["what"]
    assert run.refused == (["plan absorbed: off by 7"] if fails else [])
