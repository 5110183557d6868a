"""The table: workloads verified, then timed with their implementations interleaved."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import liger, peers
from .memory import ResidentPeak, step_peak
from .profiles import Profile
from .results import Copied, group_rows
from .stats import quantiles
from .timing import Effort, Run, interleave
from .workloads import Workload, WrongResultError, to_job

ALL = ("eager", "sdpa", "compile", "mmfast")
ASKED, TOUCHED = "asked", "touched"
COMPILED = ("compile", peers.FLEX)
"""Implementations that torch.compile makes: they need time of their own."""
MAY_FAIL = (*COMPILED, *peers.NAMES, liger.NAME)
"""Peers that need not take every problem: what they raise is the reason why they are left out."""
OUT_OF_TIME = "the time of this profile was over; PROFILE=full has"
CLONE = "clone"  # timed beside the implementations, in no row
LEAST_TOUCHED = 1 << 20  # below it are pages of stacks and heaps, whatever is called


class Table:
    """Collects `rows`, what was `left_out` and why, and which kernels were `refused` as wrong.

    `left_s()` says how much time there is; past it nothing new is begun. `compile_s` is how long
    torch.compile may take in all, and again for FlexAttention (default: the profile's, for
    attention).
    """

    def __init__(
        self,
        profile: Profile,
        device: torch.device,
        resident: ResidentPeak,
        left_s: Callable[[], float],
        *,
        compile_s: float | None = None,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []
        self.refused: list[str] = []
        self._effort, self._device = profile.effort, device
        self._resident, self._left_s = resident, left_s
        compile_s = profile.compile_s if compile_s is None else compile_s
        self._compile_left = dict.fromkeys(COMPILED, compile_s)
        no_time = f"no time for it in the {profile.name} profile; PROFILE=full has"
        self._why_no_compile = dict.fromkeys(COMPILED, no_time)

    def measure(
        self,
        workload: Workload,
        *,
        impls: Sequence[str] = ALL,
        effort: Effort | None = None,
        memory: str = TOUCHED,
    ) -> None:
        """Verify and time one workload. Without a right mmfast there is nothing to compare.

        `memory`: which of the two measurements of memory.py to make, TOUCHED (both), ASKED or "".
        """
        if self._left_s() <= 0.0:
            self._leave_out(workload, "all", OUT_OF_TIME)
            return
        runs = self._verified(workload, impls)
        if "mmfast" in runs:
            self.rows += self._timed(workload, runs, effort or self._effort, memory)

    def _verified(self, workload: Workload, impls: Sequence[str]) -> dict[str, Run]:
        runs: dict[str, Run] = {}
        for impl in impls:
            if impl in COMPILED:
                run = self._compiled(workload, impl)
            elif impl in MAY_FAIL:
                run = self._tried(workload, impl)
            else:
                run = self._right(workload, impl)
            if run is not None:
                runs[impl] = run
        return runs

    def _right(self, workload: Workload, impl: str) -> Run | None:
        try:
            run = workload.run(impl)
            workload.check(impl, run)
            return run
        except WrongResultError as error:
            self._refuse(workload, impl, error)
            return None

    def _tried(self, workload: Workload, impl: str) -> Run | None:
        """A peer may fail in many ways: it is left out, with what it said."""
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                return self._right(workload, impl)
            except peers.CannotTakeError as error:
                self._leave_out(workload, impl, str(error))
            except Exception as error:
                reasons = dict.fromkeys(_first_line(w.message) for w in heard[-4:])
                said = "; ".join([_first_line(error), *reasons])
                self._leave_out(workload, impl, f"{type(error).__name__}: {said}")
        return None

    def _compiled(self, workload: Workload, impl: str) -> Run | None:
        start = time.perf_counter()
        if self._compile_left[impl] <= 0.0:
            self._leave_out(workload, impl, self._why_no_compile[impl])
            return None
        try:
            if impl != "compile":
                return self._tried(workload, impl)
            return self._right(workload, impl)
        except Exception as error:  # no compiler, no support ...: the next will not do better
            said = f"{type(error).__name__} {_first_line(error)}"
            self._why_no_compile[impl] = f"torch.compile fails here: {said}"
            self._compile_left[impl] = 0.0
            self._leave_out(workload, impl, self._why_no_compile[impl])
        finally:
            self._compile_left[impl] -= time.perf_counter() - start
        return None

    def _timed(
        self, workload: Workload, runs: Mapping[str, Run], effort: Effort, memory: str
    ) -> list[dict[str, Any]]:
        clone = workload.clone()
        beside = {} if clone is None else {CLONE: clone.run}
        taken = interleave({**runs, **beside}, effort, self._device)
        copying = taken.pop(CLONE, None)
        peaks: dict[str, int] = {}
        if memory:
            peaks = {impl: step_peak(run, self._device) for impl, run in runs.items()}
        if memory == TOUCHED:
            # Kernels of one's own may take memory that the allocator does not see.
            touched = self._resident.measure(to_job(workload, "mmfast")) or 0
            if touched >= LEAST_TOUCHED:
                peaks["mmfast"] = max(peaks["mmfast"], touched)
        group = workload.problem.group(workload.op)
        copied = None
        if clone is not None and copying is not None:
            copied = Copied(clone.units * quantiles(copying).p50, clone.beyond_cache)
        return group_rows(group, taken, peaks, workload.least_s(), copied)

    def _refuse(self, workload: Workload, impl: str, error: WrongResultError) -> None:
        self._leave_out(workload, impl, f"refused, its numbers are wrong: {error}")
        if impl == "mmfast":
            self.refused.append(str(error))

    def _leave_out(self, workload: Workload, impl: str, why: str) -> None:
        self.left_out.append({"what": f"{workload.problem.label(workload.op)}: {impl}", "why": why})


def _first_line(said: object) -> str:
    return (str(said).strip().splitlines() or [""])[0]
