"""What a profile measures: the workloads of the table, in which order, with how much effort.

float32 first: when the time runs out it is bfloat16 that is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import drop_in, liger, peers, plans
from .gates import Gate, GateProblem, GateRuler
from .impls import Problem
from .layers import Layer, LayerCase, LayerProblem, MissingTransformersError
from .memory import ResidentPeak
from .modules import Module
from .problems import DIRECTIONS
from .profiles import GATES, TINY, Profile
from .stacks import ALL_STACKS, Stack, StackProblem, directions_of
from .stacks import CASES as STACKS
from .table import ASKED, COMPILED, OUT_OF_TIME, TOUCHED, Table
from .timing import Effort
from .workloads import Attention, Ruler, WrongResultError

PARTS = ("training", "drop_in", "attention", "stacks", "plans", "gates")
"""What can be run alone; the first is not part of the table."""
PLAN_WEIGHT = 0.3
MODEL_WEIGHT = 6


class Measuring:
    """The table of one run. `tick(what, weight)` is told what begins; `weight` adds up to `total`.
    `tell(line)` hears what should be shown at once.

    `dtypes` are those of attention: those whose products this machine has instructions for.
    """

    def __init__(
        self,
        profile: Profile,
        device: torch.device,
        dtypes: Sequence[str],
        parts: Sequence[str],
        left_s: Callable[[], float],
        tick: Callable[[str, float], None],
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._profile, self._device, self._dtypes, self._parts = profile, device, dtypes, parts
        self._left_s, self._tick, self._tell = left_s, tick, tell
        self._tables: list[Table] = []
        self._skipped: list[dict[str, str]] = []
        self._wrong_plans: list[str] = []
        self._models = drop_in.Found([], [], [], [])
        self.plans: list[dict[str, Any]] = []
        """What `plans.measure` gives: the planner's choices are no rows of the table."""
        self._peers: tuple[str, ...] = ()  # of attention, besides eager, sdpa and compile
        self._liger = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows = [row for table in self._tables for row in table.rows]
        return self._models.rows + rows

    @property
    def models(self) -> list[dict[str, Any]]:
        """Of each model of transformers that was measured: what is in no row of the table."""
        return self._models.models

    @property
    def left_out(self) -> list[dict[str, str]]:
        tables = [entry for table in self._tables for entry in table.left_out]
        return self._skipped + self._models.left_out + tables

    @property
    def refused(self) -> list[str]:
        tables = [why for table in self._tables for why in table.refused]
        return tables + self._models.refused + self._wrong_plans

    @property
    def total(self) -> float:
        """The weights of all that `run` will do."""
        profile, total = self._profile, 0.0
        if "drop_in" in self._parts:
            total += MODEL_WEIGHT * len(profile.drop_in.cases)
        if "attention" in self._parts:
            total += (
                (4 if self._device.type == "cpu" else 6)
                + 6 * len(profile.cases) * len(self._dtypes)
                + 3 * len(profile.module_cases)
            )
        if "stacks" in self._parts:
            total += sum(4 * len(profile.stacks.cases[dtype]) for dtype in self._dtypes)
        if "plans" in self._parts:
            total += PLAN_WEIGHT * self._plan_problems
        if "gates" in self._parts:
            total += sum(len(cases) for cases in profile.gates.cases.values())
            total += 4 * len(profile.gates.layers)
        return total

    def run(self) -> None:
        """Measure all parts but the training."""
        profile, device, left_s = self._profile, self._device, self._left_s
        touched = device.type == "cpu" and bool({"attention", "gates"} & set(self._parts))
        with ResidentPeak(enabled=touched) as resident:
            attention = Table(profile, device, resident, left_s)
            compile_s = profile.gates.compile_s
            gates = Table(profile, device, resident, left_s, compile_s=compile_s)
            stacks = Table(profile, device, resident, left_s, compile_s=profile.stacks.compile_s)
            self._tables = [attention, stacks, gates]
            wants = self._parts
            self._find_peers()
            if "drop_in" in wants:
                self._drop_in()
            if "attention" in wants:
                self._apart(attention)
                self._attention(attention, "float32")
            if "stacks" in wants:
                self._stacks(stacks, "float32")
            if "plans" in wants:
                self._plans()
            if "gates" in wants:
                self._gates(gates, "float32")
                self._layers(gates)
            if "attention" in wants:
                self._modules(attention)
                for dtype in self._dtypes[1:]:
                    self._attention(attention, dtype)
            if "stacks" in wants:
                for dtype in self._dtypes[1:]:
                    self._stacks(stacks, dtype)
            if "gates" in wants:
                self._gates(gates, "bfloat16")

    def _find_peers(self) -> None:
        """Which peers there are here; what a GPU could have and has not is said once."""
        offered, absent = peers.offered(self._device)
        if "attention" in self._parts:
            for name, why in absent.items():
                self._skip(f"cross_attention, all cases: {name}", why)
            # On the CPU FlexAttention is one peer of a forward, and compiles for each problem.
            if self._device.type != "cpu" or not self._in_a_hurry:
                self._peers = offered
        if "gates" in self._parts:
            found = liger.offered(self._device)
            self._liger = bool(found)
            if found is None:
                self._skip(f"gates, all cases: {liger.NAME}", liger.ABSENT)

    def _apart(self, table: Table) -> None:
        few = Effort(budget_s=1.0, min_rounds=2, max_rounds=10)
        many = Effort(budget_s=self._profile.effort.budget_s, min_rounds=20, by_the_host=True)
        on_device = self._peers if self._device.type != "cpu" else ()
        longest = self._profile.longest
        apart = [(TINY, "float32", many), (longest, "float32", few)]
        if self._device.type != "cpu" and "bfloat16" in self._dtypes:  # which most peers need
            apart.append((longest, "bfloat16", few))
        for case, dtype, effort in apart:
            ruler = Ruler(case, getattr(torch, dtype)) if self._left_s() > 0 else None
            for direction in DIRECTIONS:
                self._tick(f"cross_attention, {case.name}", 1)
                workload = Attention(Problem(case, dtype, direction), self._device, ruler)
                impls = ("eager", "sdpa", *on_device, "mmfast")
                table.measure(workload, impls=impls, effort=effort)

    def _attention(self, table: Table, dtype: str) -> None:
        impls = ("eager", "sdpa", "compile", *self._peers, "mmfast")
        if dtype != "float32" and self._in_a_hurry:
            impls = tuple(impl for impl in impls if impl not in COMPILED)
            self._skip(f"cross_attention, all cases in {dtype}: what has to be compiled")
        for case in self._profile.cases:
            ruler = Ruler(case, getattr(torch, dtype)) if self._left_s() > 0 else None
            for direction in DIRECTIONS:
                self._tick(f"cross_attention, {case.name}, {dtype}, {direction}", 3)
                workload = Attention(Problem(case, dtype, direction), self._device, ruler)
                table.measure(workload, impls=impls)

    def _drop_in(self) -> None:
        plan = self._profile.drop_in
        self._models = drop_in.measure(
            plan,
            self._device,
            self._left_s,
            lambda what: self._tick(what, MODEL_WEIGHT),
            self._tell,
            OUT_OF_TIME,
        )
        if unmeasured := [name for name in drop_in.CASES if name not in plan.cases]:
            self._skip(f"{drop_in.OP}: {', '.join(unmeasured)}")

    def _modules(self, table: Table) -> None:
        impls = ("eager", "sdpa", "mmfast")
        if not self._in_a_hurry:
            impls = ("eager", "sdpa", "compile", "mmfast")
        for case in self._profile.cases:
            if case.name in self._profile.module_cases:
                for direction in DIRECTIONS:
                    self._tick(f"MultiheadAttention, {case.name}", 1.5)
                    problem = Problem(case, "float32", direction)
                    table.measure(Module(problem, self._device), impls=impls)

    def _stacks(self, table: Table, dtype: str) -> None:
        plan = self._profile.stacks
        compiled = ("compile",) if plan.compile_s > 0.0 else ()
        if not compiled:
            self._skip(f"{ALL_STACKS} in {dtype}: compile")
        if unmeasured := [case.name for case in STACKS if case not in plan.cases[dtype]]:
            self._skip(f"{ALL_STACKS} in {dtype}: {', '.join(unmeasured)}")
        memory = ASKED if dtype in plan.memory_dtypes else ""
        for case in plan.cases[dtype]:
            for direction in directions_of(case):
                self._tick(f"{case.op}, {case.name}, {dtype}, {direction}", 2)
                if self._left_s() > 0:  # the inputs alone take a while
                    workload = Stack(StackProblem(case, dtype, direction), self._device)
                    impls = ("eager", "sdpa", *compiled, "mmfast")
                    table.measure(workload, impls=impls, effort=plan.effort, memory=memory)
                else:
                    self._skip(f"{case.op} {case.name} {dtype} {direction}", OUT_OF_TIME)

    @property
    def _plan_problems(self) -> int:
        return len(plans.GRIDS[self._profile.name].problems(self._dtypes))

    def _plans(self) -> None:
        name, dtypes = self._profile.name, self._dtypes

        def tick(what: str) -> None:
            self._tick(what, PLAN_WEIGHT)

        try:
            self.plans = plans.measure(name, self._device, dtypes, self._left_s, tick)
        except WrongResultError as error:
            self._wrong_plans.append(str(error))
        if missing := self._plan_problems - len(self.plans):
            why = self._wrong_plans[0] if self._wrong_plans else OUT_OF_TIME
            self._skip(f"plans: {missing} problems of the grid", why)

    def _gates(self, table: Table, dtype: str) -> None:
        plan = self._profile.gates
        cases = plan.cases[dtype]
        measured = {case.name for case in cases}
        if unmeasured := [name for name in GATES if name not in measured]:
            self._skip(f"gates in {dtype}: {', '.join(unmeasured)}")
        thorough = plan.thorough if dtype in plan.thorough_dtypes else frozenset()
        if uncompiled := [name for name in measured if name not in thorough]:
            self._skip(f"gates in {dtype}: compile and memory of {len(uncompiled)} cases")
        for case in cases:
            ruler = GateRuler(case, getattr(torch, dtype))
            for direction in DIRECTIONS:
                self._tick(f"gates, {case.name}, {dtype}, {direction}", 0.5)
                others = ("compile",) if case.name in thorough else ()
                if self._liger and liger.takes(case):
                    others = (*others, liger.NAME)
                table.measure(
                    Gate(GateProblem(case, dtype, direction), self._device, ruler),
                    impls=("eager", *others, "mmfast"),
                    effort=plan.effort,
                    memory=TOUCHED if case.name in thorough else "",
                )

    def _layers(self, table: Table) -> None:
        for case in self._profile.gates.layers:
            for direction in DIRECTIONS:
                self._tick(f"{case.op}, {case.name}", 2)
                if self._left_s() > 0:
                    self._layer(table, case, direction)

    def _layer(self, table: Table, case: LayerCase, direction: str) -> None:
        try:
            layer = Layer(LayerProblem(case, "float32", direction), self._device)
        except MissingTransformersError as error:
            self._skip(f"{case.op} {case.name} {direction}", str(error))
            return
        compiled = () if self._in_a_hurry else ("compile",)
        # The process that measures memory touched would need seconds to import transformers.
        table.measure(layer, impls=(*layer.peers, *compiled, "mmfast"), memory=ASKED)

    @property
    def _in_a_hurry(self) -> bool:
        return math.isfinite(self._profile.compile_s)

    def _skip(self, what: str, why: str | None = None) -> None:
        name = self._profile.name
        why = why or f"no time for it in the {name} profile; PROFILE=full has"
        self._skipped.append({"what": what, "why": why})
