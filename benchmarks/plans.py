"""Is the planner right? Every plan of `mmfast.planning` on a grid of shapes, timed side by side.

`python -m benchmarks.plans` writes plans.json and plans.png and prints the summary. A problem is
one `mmfast.nn.CrossModalAttention`, in a dtype and a direction, dense or ragged; its plans are
forced with `use_plan` and timed in interleaved rounds. The planner is right where its choice takes
at most a tenth longer than the fastest plan.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmfast
from mmfast import planning
from mmfast.planning import PLANS, AttentionShapes

from . import machine
from .files import write_atomically
from .modules import judge_plainly
from .problems import DIRECTIONS, FORWARD_BACKWARD
from .stats import geometric_mean
from .timing import Effort, interleave

NEAR = 1.1
"""Times the fastest plan: what counts as right."""
GOAL = 0.95


@dataclass(frozen=True)
class PlanCase:
    """Sizes of a cross-attention; `fill` is the mean share of valid rows of the context."""

    B: int
    N: int
    M: int
    width: int
    context: int
    heads: int
    kv_heads: int
    context_grad: bool = True
    fill: float = 1.0

    @property
    def lens(self) -> list[int] | None:
        """Evenly spread round their mean, the longest at most M; None for a dense context."""
        if self.fill == 1.0:
            return None
        if self.B == 1:
            return [round(self.fill * self.M)]
        least = 2 * self.fill - 1
        spread = [least + (1 - least) * item / (self.B - 1) for item in range(self.B)]
        return [round(share * self.M) for share in spread]


def _case(sizes: str, context_grad: bool = True) -> PlanCase:
    """From "BxNxM width/context heads/kv_heads"."""
    rows, widths, heads = sizes.split()
    numbers = [*rows.split("x"), *widths.split("/"), *heads.split("/")]
    return PlanCase(*map(int, numbers), context_grad=context_grad)


SMALL = (
    # Attention pooling and probes: one query.
    _case("4x1x64 256/256 4/4"), _case("2x1x577 384/384 6/6"), _case("8x1x50 192/192 3/3", False),
    _case("4x1x197 768/768 12/12", False), _case("1x1x729 512/512 8/8"),
    # Few queries: latents, resamplers, probes of regions.
    _case("2x4x257 384/384 6/6"), _case("4x8x196 512/512 8/8", False),
    _case("2x8x500 256/256 4/4"), _case("1x16x257 768/768 12/12"),
    _case("8x4x36 256/512 4/4", False), _case("2x16x400 256/256 8/8"),
    # Where the plans cross.
    _case("2x32x257 384/704 6/6"), _case("1x32x257 384/704 6/6", False),
    _case("4x24x100 512/512 8/8"), _case("2x48x128 256/256 4/4"), _case("4x16x49 384/384 6/6"),
    _case("2x24x196 512/768 8/2"), _case("2x12x128 512/512 8/2", False),
    # Many queries: text over patches, objects over a feature map, speech.
    _case("4x40x36 384/384 6/6"), _case("2x128x197 256/256 4/4", False),
    _case("1x64x400 256/256 8/8"), _case("2x100x256 256/256 8/8"), _case("8x64x50 192/192 6/6"),
    _case("2x77x77 512/768 8/8"), _case("1x448x500 192/192 3/3", False),
    _case("2x64x300 512/512 8/2", False),
)  # fmt: skip
LARGE = (
    _case("8x1x577 768/768 12/12"), _case("8x1x729 1152/1152 16/16", False),
    _case("8x32x257 768/1408 12/12", False), _case("2x32x257 768/1408 12/12"),
    _case("8x8x1500 512/512 8/8"), _case("8x64x257 1024/1024 16/16"),
    _case("8x40x36 768/2048 12/12", False), _case("8x128x197 768/768 12/12"),
    _case("2x128x1601 1024/1280 16/8", False), _case("4x100x850 256/256 8/8"),
    _case("2x448x1500 512/512 8/8"), _case("16x64x50 512/512 8/8"),
    _case("4x16x577 1024/1024 16/4"), _case("1x144x576 1024/1024 16/16"),
)  # fmt: skip
"""The shapes of the papers: where the time goes."""
DENSE_AND_RAGGED = (1.0, 0.6)


@dataclass(frozen=True)
class Grid:
    """The cases, each in two dtypes, two directions, dense and ragged, and how long to time."""

    cases: tuple[PlanCase, ...]
    effort: Effort

    def problems(self, dtypes: Sequence[str]) -> list[tuple[PlanCase, str, str]]:
        """(case, dtype, direction): all of a case one after the other."""
        return [
            (dataclasses.replace(case, fill=fill), dtype, direction)
            for case in self.cases
            for dtype in dtypes
            for fill in DENSE_AND_RAGGED
            for direction in DIRECTIONS
        ]


GRIDS = {
    "smoke": Grid(SMALL[:1], Effort(0.01, 2, 3, 0.0)),
    "quick": Grid(SMALL, Effort(0.12, 5, 40, 5e-4)),
    "full": Grid(SMALL + LARGE, Effort(2.0, 9, 200, 2e-3)),
}
DTYPES = ("float32", "bfloat16")


class Problem:
    """One module with its inputs; `run(plan)` is a call of it that follows the plan."""

    def __init__(self, case: PlanCase, dtype: str, direction: str, device: torch.device) -> None:
        self.case, self.dtype, self.direction = case, dtype, direction
        self._trains = direction == FORWARD_BACKWARD
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = mmfast.nn.CrossModalAttention(
                case.width, case.heads, num_kv_heads=case.kv_heads, context_dim=case.context
            )
            self._x = torch.randn(case.B, case.N, case.width)
            self._context = torch.randn(case.B, case.M, case.context)
            self._dout = torch.randn(case.B, case.N, case.width)
        to: Any = {"device": device, "dtype": getattr(torch, dtype)}
        self._module = module.to(**to)
        self._x, self._context, self._dout = (
            t.to(**to) for t in (self._x, self._context, self._dout)
        )
        self._lens = None if case.lens is None else torch.tensor(case.lens)
        self._x.requires_grad_(self._trains)
        self._context.requires_grad_(self._trains and case.context_grad)

    def plans(self) -> list[str]:
        """Those that a call can follow."""
        plan = self.modelled("auto")
        return [cost.name for cost in plan.costs if cost.why_not is None]

    def modelled(self, name: str) -> planning.Plan:
        """What the planner makes of a call, as the module asks it."""
        with mmfast.use_plan(name):
            self._call(self._module)
            sizes, dtype, device, training, refused = self._module.__dict__["_planned_call"]
            return planning.plan(AttentionShapes(*sizes), dtype, device, training, refused=refused)

    def run(self, plan: str) -> Callable[[], object]:
        def planned() -> object:
            with mmfast.use_plan(plan):
                return self._call(self._module)

        return planned

    def _call(self, module: Any) -> tuple[Tensor, ...]:
        if not self._trains:
            with torch.no_grad():
                return (module(self._x, self._context, context_lens=self._lens),)
        out = module(self._x, self._context, context_lens=self._lens)
        wanted = [self._x, *module.parameters()]
        if self.case.context_grad:
            wanted.append(self._context)
        return (out, *torch.autograd.grad(out, wanted, self._dout))

    def check(self, plans: Iterable[str]) -> None:
        """Against the reference in float64, at most a few times as far off as in this dtype.

        Raises WrongResultError.
        """
        exact = copy.copy(self)
        exact._module = copy.deepcopy(self._module).double()
        for name in ("_x", "_context", "_dout"):
            tensor: Tensor = getattr(self, name)
            twin = tensor.detach().double().requires_grad_(tensor.requires_grad)
            setattr(exact, name, twin)
        with mmfast.use_backend("reference"), mmfast.use_plan("projected"):
            truth, peer = exact._call(exact._module), self._call(self._module)
        # The gradient of the key bias is 0 but for rounding, of terms that no result shows.
        names = ["out", "x", *(name for name, _ in self._module.named_parameters()), "context"]
        judged = [i for i, name in enumerate(names[: len(truth)]) if name != "k_proj.bias"]
        for plan in plans:
            with mmfast.use_plan(plan):
                got = self._call(self._module)
            who = f"plan {plan} of {self.case}"
            judge_plainly(who, *([results[i] for i in judged] for results in (got, truth, peer)))


def measure(
    profile: str,
    device: torch.device,
    dtypes: Sequence[str] = DTYPES,
    left_s: Callable[[], float] = lambda: float("inf"),
    tick: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """A row for each problem of the profile's grid: the milliseconds of each plan, measured (the
    least of the rounds) and modelled, the planner's choice, and how much longer than the best it
    takes (`ratio`).

    Nothing new begins once `left_s()` is 0. `tick` hears of each problem before it is timed.
    """
    grid = GRIDS[profile]
    rows = []
    for case, dtype, direction in grid.problems(dtypes):
        if left_s() <= 0.0:
            break
        tick(f"plans, {case.B}x{case.N}x{case.M} {dtype} {direction}")
        problem = Problem(case, dtype, direction, device)
        plan = problem.modelled("auto")
        able = problem.plans()
        if direction == FORWARD_BACKWARD and case.fill < 1.0:  # which covers the forward
            problem.check(able)
        taken = interleave({name: problem.run(name) for name in able}, grid.effort, device)
        least = {name: 1e3 * min(times) for name, times in taken.items()}
        rows.append(_row(problem, plan, least))
    return rows


def _row(problem: Problem, plan: planning.Plan, least: dict[str, float]) -> dict[str, Any]:
    return {
        "case": dataclasses.asdict(problem.case),
        "dtype": problem.dtype,
        "direction": problem.direction,
        "measured_ms": least,
        "modelled_ms": {cost.name: 1e3 * cost.seconds for cost in plan.costs},
        "chosen": plan.name,
        "best": min(least, key=lambda name: least[name]),
        "ratio": least[plan.name] / min(least.values()),
        "source": plan.source,
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share of right choices, the worst one, and how often each plan is the best."""
    if not rows:
        return {"problems": 0}
    always = {
        plan: geometric_mean(
            row["measured_ms"].get(plan, row["measured_ms"]["projected"])
            / row["measured_ms"][row["best"]]
            for row in rows
        )
        for plan in PLANS
    }
    return {
        "problems": len(rows),
        "share_near_best": sum(row["ratio"] <= NEAR for row in rows) / len(rows),
        "goal": GOAL,
        "mean_ratio": geometric_mean(row["ratio"] for row in rows),
        "worst_ratio": max(row["ratio"] for row in rows),
        "best": dict(Counter(row["best"] for row in rows)),
        "chosen": dict(Counter(row["chosen"] for row in rows)),
        "mean_ratio_of_always": always,
        "source": rows[0]["source"],
    }


# --- the picture ----------------------------------------------------------------------------------

COLOURS = {"projected": "#8a8f98", "packed": "#5b7db1", "absorbed": "#1b9e77"}


def draw(rows: Sequence[dict[str, Any]]) -> Any:
    """A matplotlib figure: how much longer than the best plan the choice takes, and the modelled
    against the measured gain of not projecting the padded context."""
    from matplotlib import pyplot as plt

    told = summary(rows)
    figure, (regret, gain) = plt.subplots(1, 2, figsize=(10, 3.6))
    ordered = sorted(row["ratio"] for row in rows)
    place = [(index + 1) / len(ordered) for index in range(len(ordered))]
    regret.step(place, ordered, where="post", color="#1b9e77", linewidth=2, label="the planner")
    for plan in PLANS:
        always = sorted(
            row["measured_ms"].get(plan, row["measured_ms"]["projected"])
            / row["measured_ms"][row["best"]]
            for row in rows
        )
        regret.step(place, always, where="post", color=COLOURS[plan], linewidth=1,
                    linestyle=":", label=f"always {plan}")  # fmt: skip
    regret.axhline(NEAR, color="#444444", linewidth=0.8)
    regret.axvline(GOAL, color="#444444", linewidth=0.8, linestyle="--")
    regret.set_yscale("log")
    regret.set_xlabel("share of the problems")
    regret.set_ylabel("time, of the best plan's")
    share = told["share_near_best"]
    regret.set_title(f"{share:.1%} of {len(rows)} within 10 % of the best", loc="left")
    regret.legend(frameon=False)
    for plan in ("packed", "absorbed"):
        found = [row for row in rows if plan in row["measured_ms"]]
        gain.scatter(
            [row["measured_ms"]["projected"] / row["measured_ms"][plan] for row in found],
            [row["modelled_ms"]["projected"] / row["modelled_ms"][plan] for row in found],
            s=9, color=COLOURS[plan], label=plan, alpha=0.8, linewidths=0,
        )  # fmt: skip
    ends = [0.05, 30.0]
    gain.plot(ends, ends, color="#444444", linewidth=0.8)
    for line in (gain.axhline, gain.axvline):
        line(1.0, color="#bbbbbb", linewidth=0.8)
    gain.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    gain.set_xlabel("times faster than projected, measured")
    gain.set_ylabel("modelled")
    gain.set_title("what the model says of each plan", loc="left")
    gain.legend(frameon=False)
    figure.tight_layout()
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__)
    parser.add_argument("--profile", choices=list(GRIDS), default="quick")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)
    device = machine.device()
    rows = measure(given.profile, device)
    told = summary(rows)
    text = json.dumps({"summary": told, "rows": rows}, indent=1, allow_nan=False) + "\n"
    write_atomically(given.out / "plans.json", text)
    import matplotlib

    matplotlib.use("Agg")
    buffer = io.BytesIO()
    draw(rows).savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    write_atomically(given.out / "plans.png", buffer.getvalue())
    for name, value in told.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
