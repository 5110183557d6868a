"""What can be measured: an op on a problem, which can run, judge what a run returns, and say how
fast the machine could be at best. `Attention` is the op alone, `modules.Module` a layer around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import mmfast
from mmfast import reference
from mmfast.testing import eager, tolerance
from mmfast.testing.cases import Case, Inputs, make_inputs

from . import machine, peers
from .impls import OP, Problem, Run, freshly_compiled, function_of, make_run
from .problems import BaseProblem

MOST_SCORES = 600_000  # of the float64 reference: well under a second
RESULTS = ("out", "dq", "dk", "dv")


class WrongResultError(RuntimeError):
    """An implementation's numbers are outside the tolerance; the message holds every verdict."""


class Clone(NamedTuple):
    """A copy that is timed beside the implementations, for what they reach of its bandwidth.

    `units`: the bytes that the workload must move, in bytes that the copy moves. `beyond_cache`: do
    the workload's tensors fill the last-level cache twice?
    """

    run: Callable[[], Tensor]
    units: float
    beyond_cache: bool


class Workload(Protocol):
    """One op on one problem, on one device."""

    op: str
    problem: BaseProblem

    def run(self, impl: str) -> Run:
        """A call of this implementation, ready to be timed. Raises CannotTakeError where it is
        known not to do the problem."""

    def check(self, impl: str, run: Run) -> None:
        """Raises WrongResultError unless the numbers are right."""

    def least_s(self) -> float | None:
        """The least seconds that the machine's measured peaks allow, where that is known."""

    def clone(self) -> Clone | None:
        """For an op that is bound by memory: what its bandwidth is compared with."""


class Ruler:
    """The truth of one case and dtype, made once for both directions and all implementations.

    What an implementation returns for the full problem is judged by `mmfast.testing.tolerance` for
    as many heads as a float64 reference can afford; heads are independent, so it is exact for them.
    Where even one head is too large, the reference is made in pieces of `rows` queries.
    """

    def __init__(self, case: Case, dtype: torch.dtype, rows: int | None = None) -> None:
        scores = max(1, case.B * case.N * case.M)
        count = min(case.H, max(1, MOST_SCORES // scores))
        self.heads = torch.linspace(0, case.H - 1, count).long()
        made = make_inputs(case, dtype)
        some = {name: getattr(made, name)[:, self.heads] for name in ("q", "k", "v", "dout")}
        made = dataclasses.replace(made, case=dataclasses.replace(case, H=count, G=count), **some)
        if rows is None and scores > 20 * MOST_SCORES:
            rows = 1024
        self.truth = tolerance.truth(made) if rows is None else truth_in_pieces(made, rows)

    def check(self, impl: str, results: dict[str, Tensor]) -> None:
        """Raises WrongResultError unless every result is finite and within the tolerance."""
        if not all(bool(x.isfinite().all()) for x in results.values()):
            raise WrongResultError(f"{impl}: NaN or infinity in its results")
        some = {name: x.detach()[:, self.heads].cpu() for name, x in results.items()}
        some.setdefault("lse", self.truth.peer["lse"])  # the peers return none
        try:
            tolerance.assert_accurate(some, self.truth)
        except AssertionError as error:
            raise WrongResultError(f"{impl}: {error}") from None


def truth_in_pieces(made: Inputs, rows: int) -> tolerance.Truth:
    """`tolerance.truth(made)` without a whole score matrix, for lengths of keys and float32.

    Rows are independent, and the gradients of keys and values are sums over them. The rounding
    scales are those of the first piece, as if all were alike, which random input is.
    """
    pieces = [
        dataclasses.replace(
            made,
            case=dataclasses.replace(made.case, N=min(rows, made.case.N - start)),
            q=made.q[:, :, start : start + rows],
            dout=made.dout[:, :, start : start + rows],
        )
        for start in range(0, made.case.N, rows)
    ]
    first = tolerance.truth(pieces[0])
    stored, sums = dict(first.stored), dict(first.sums)
    for name in ("dk", "dv"):
        stored[name] *= len(pieces) ** 0.5
        sums[name] *= len(pieces)

    def whole(function: Callable[..., Any], dtype: torch.dtype) -> tolerance.Results:
        parts = [tolerance.run(function, piece.to(dtype)) for piece in pieces]
        return {
            name: sum(part[name] for part in parts)
            if name in ("dk", "dv")
            else torch.cat([part[name] for part in parts], dim=2)
            for name in parts[0]
        }

    exact = whole(reference.cross_attention, torch.float64)
    peer = whole(eager.cross_attention, made.q.dtype)
    return tolerance.Truth(made, exact, peer, stored, sums)


class Attention:
    """`mmfast.cross_attention` and its peers on one problem."""

    op = OP

    def __init__(self, problem: Problem, device: torch.device, ruler: Ruler | None = None) -> None:
        self.problem, self._device = problem, device
        self.inputs = problem.inputs(device)
        self._ruler = ruler
        self._restored: dict[str, Callable[..., Any]] = {}
        self._has_compiled = False

    def run(self, impl: str) -> Run:
        if impl in peers.NAMES:
            prepared = peers.prepare(impl, self.inputs, self._compiled)
            self._restored[impl] = prepared.restored
            return prepared.run
        function = function_of(impl)
        return make_run(self._compiled(function) if impl == "compile" else function, self.inputs)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        keep, self._has_compiled = self._has_compiled, True
        return freshly_compiled(function, keep)

    def check(self, impl: str, run: Run) -> None:
        if self._ruler is None:
            self._ruler = Ruler(self.problem.case, self.problem.torch_dtype)
        restored = self._restored.get(impl, tuple)
        results = dict(zip(RESULTS, restored(run())))  # a forward gives `out` alone
        if impl == "mmfast":
            q, k, v = (x.detach() for x in self.inputs[:3])
            lens = self.inputs.kv_lens
            results["lse"] = mmfast.cross_attention(q, k, v, kv_lens=lens, return_lse=True).lse
        self._ruler.check(impl, results)

    def least_s(self) -> float:
        problem = self.problem
        peak = machine.gemm_peak(problem.torch_dtype, self._device)
        size = problem.bytes()
        moving = size / machine.bandwidth(int(size), self._device)
        return max(problem.case.flops(problem.trains) / peak, moving)

    def clone(self) -> None:
        return None


def to_job(workload: Workload, impl: str) -> dict[str, Any]:
    """A workload and an implementation as JSON, for another process."""
    return {"op": workload.op, "problem": workload.problem.to_json(), "impl": impl}
