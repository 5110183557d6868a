"""The suite tests itself, the part of the planner's grid: its size, refusals, the summary."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import mmfast

from . import plans
from .plans import DTYPES, GRIDS, PlanCase, Problem
from .problems import DIRECTIONS
from .timing import Effort
from .workloads import WrongResultError

CPU = torch.device("cpu")
TINY = PlanCase(3, 2, 7, 24, 16, 2, 1)
RAGGED = dataclasses.replace(TINY, fill=0.6)


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_the_grid_has_200_problems(profile: str) -> None:
    problems = GRIDS[profile].problems(DTYPES)
    assert len(problems) == len(set(problems)) >= 200
    ragged = [case for case, *_ in problems if case.lens is not None]
    assert len(ragged) == len(problems) / 2
    for case in ragged:
        assert case.lens is not None and len(case.lens) == case.B
        assert all(0 < length <= case.M for length in case.lens)
        assert abs(sum(case.lens) / (case.B * case.M) - case.fill) < 0.02


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context_grad", [True, False])
def test_all_plans_are_right(dtype: str, direction: str, context_grad: bool) -> None:
    for case, expected in ((TINY, 3), (RAGGED, 3)):
        case = dataclasses.replace(case, context_grad=context_grad)
        problem = Problem(case, dtype, direction, CPU)
        able = problem.plans()
        assert {"projected", "absorbed"} <= set(able) and len(able) <= expected
        problem.check(able)


def test_a_wrong_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is a hundredth off is not timed."""
    call = Problem._call

    def planted(self: Problem, module: Any) -> Any:
        results = call(self, module)
        if mmfast.planning.current_plan() == "absorbed":
            return (results[0] * 1.01, *results[1:])
        return results

    monkeypatch.setattr(Problem, "_call", planted)
    problem = Problem(RAGGED, "float32", "forward_backward", CPU)
    problem.check(["projected"])
    with pytest.raises(WrongResultError, match="plan absorbed of PlanCase"):
        problem.check(["absorbed"])


def test_a_run_follows_its_plan() -> None:
    problem = Problem(RAGGED, "float32", "forward", CPU)
    for name in problem.plans():
        assert problem.modelled(name).name == name


def test_rows_and_their_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    effort = Effort(budget_s=0.0, min_rounds=1, max_rounds=1, sample_s=0.0)
    monkeypatch.setitem(GRIDS, "smoke", plans.Grid((TINY,), effort))
    told: list[str] = []
    rows = plans.measure("smoke", CPU, ("float32",), tick=told.append)
    assert len(rows) == len(told) == 4
    for row in rows:
        assert row["ratio"] >= 1.0
        assert row["measured_ms"][row["best"]] == min(row["measured_ms"].values())
        assert set(row["measured_ms"]) <= set(row["modelled_ms"])
        assert row["chosen"] in row["measured_ms"]
    assert plans.measure("smoke", CPU, left_s=lambda: 0.0) == []
    assert plans.summary([]) == {"problems": 0}


def _row(chosen: str, **times: float) -> dict[str, Any]:
    best = min(times, key=lambda name: times[name])
    return {
        "measured_ms": times, "modelled_ms": times, "chosen": chosen, "best": best,
        "ratio": times[chosen] / times[best], "source": "assumed",
    }  # fmt: skip


ROWS = [
    _row("projected", projected=1.0, absorbed=4.0),
    _row("packed", projected=1.05, packed=1.0, absorbed=8.0),
    _row("absorbed", projected=1.0, packed=1.0, absorbed=1.1),
    _row("absorbed", projected=1.0, packed=1.0, absorbed=1.2),
]


def test_the_share_of_right_choices() -> None:
    told = plans.summary(ROWS)
    assert told["problems"] == 4
    assert told["share_near_best"] == 0.75
    assert told["worst_ratio"] == 1.2
    assert told["chosen"] == {"projected": 1, "packed": 1, "absorbed": 2}
    assert told["mean_ratio_of_always"]["projected"] == pytest.approx(1.05**0.25)
    assert told["mean_ratio_of_always"]["absorbed"] == pytest.approx((4 * 8 * 1.1 * 1.2) ** 0.25)


def test_the_picture_says_the_share() -> None:
    from matplotlib import pyplot as plt

    plt.switch_backend("Agg")
    figure = plans.draw(ROWS)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0] == "75.0% of 4 within 10 % of the best"
    plt.close(figure)
