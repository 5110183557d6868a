"""What can be measured: an op on a problem, which can run, judge what a run returns, and say how
fast the machine could be at best. `Attention` is the op alone, `modules.Module` a layer around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

import mmfast
from mmfast import reference
from mmfast.testing import tolerance
from mmfast.testing.cases import Case, make_inputs

from . import machine
from .impls import OP, Problem, Run, function_of, make_run

MOST_SCORES = 600_000  # of the float64 reference: well under a second
RESULTS = ("out", "dq", "dk", "dv")


class WrongResultError(RuntimeError):
    """An implementation's numbers are outside the tolerance; the message holds every verdict."""


class Workload(Protocol):
    """One op on one problem, on one device."""

    op: str
    problem: Problem

    def run(self, impl: str) -> Run:
        """A call of this implementation, ready to be timed."""

    def check(self, impl: str, run: Run) -> None:
        """Raises WrongResultError unless the numbers are right."""

    def least_s(self) -> float | None:
        """The least seconds that the machine's measured peaks allow, where that is known."""


class Ruler:
    """The truth of one case and dtype, made once for both directions and all implementations.

    What an implementation returns for the full problem is judged by `mmfast.testing.tolerance` for
    as many heads as a float64 reference can afford; heads are independent, so it is exact for them.
    """

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        count = min(case.H, max(1, MOST_SCORES // max(1, case.B * case.N * case.M)))
        self.heads = torch.linspace(0, case.H - 1, count).long()
        made = make_inputs(case, dtype)
        some = {name: getattr(made, name)[:, self.heads] for name in ("q", "k", "v", "dout")}
        case = dataclasses.replace(case, H=count, G=count)
        self.truth = tolerance.truth(dataclasses.replace(made, case=case, **some))

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


class LongRuler:
    """The same for a problem whose scores are too many for a reference in one piece: the float64
    truth is summed over chunks of rows, and the rule is the plain one."""

    def __init__(self, workload: Attention, rows: int = 512) -> None:
        q, k, v, lens, _, dout = workload.inputs
        trains = dout is not None
        self._peer = workload.run("eager")()
        lens = None if lens is None else lens.cpu()
        k64, v64 = (x.detach().double().cpu().requires_grad_(trains) for x in (k, v))
        chunks: list[tuple[Tensor, ...]] = []
        for start in range(0, q.shape[2], rows):
            part = q[:, :, start : start + rows].detach().double().cpu().requires_grad_(trains)
            out = reference.cross_attention(part, k64, v64, kv_lens=lens)
            grads: tuple[Tensor, ...] = ()
            if dout is not None:
                into = dout[:, :, start : start + rows].double().cpu()
                grads = torch.autograd.grad(out, (part, k64, v64), into)
            chunks.append((out.detach(), *grads))
        along_rows = ("out", "dq")
        self._exact = [
            torch.cat(parts, dim=2) if name in along_rows else sum(parts)
            for name, parts in zip(RESULTS, zip(*chunks))
        ]

    def check(self, impl: str, results: dict[str, Tensor]) -> None:
        """Raises WrongResultError unless every result is within the plain rule."""
        got = [results[name] for name in RESULTS if name in results]
        judge_plainly(impl, got, self._exact, self._peer)


def judge_plainly(
    who: str, got: Sequence[Tensor], exact: Sequence[Tensor], peer: Sequence[Tensor]
) -> None:
    """Raises WrongResultError unless the largest error of `(out, *gradients)` is at most that of
    eager times the tolerance's factor, plus a few roundings of the largest value."""
    for index, (mine, true, usual) in enumerate(zip(got, exact, peer)):
        factor = tolerance.GRADIENT_FACTOR if index else tolerance.FORWARD_FACTOR
        true = true.detach().cpu()
        error = float((mine.detach().cpu() - true).abs().max())
        expected = float((usual.detach().cpu() - true).abs().max())
        floor = tolerance.SUM_ROUNDINGS * torch.finfo(mine.dtype).eps * float(true.abs().max())
        if not error <= factor * expected + floor:  # NaN compares false
            off = f"off by {error:.3g}, eager by {expected:.3g}"
            raise WrongResultError(f"{who}: result {index} is {off}")


class Attention:
    """`mmfast.cross_attention` and its peers on one problem."""

    op = OP

    def __init__(
        self, problem: Problem, device: torch.device, ruler: Ruler | LongRuler | None = None
    ) -> None:
        self.problem, self._device = problem, device
        self.inputs = problem.inputs(device)
        self._ruler = ruler

    def run(self, impl: str) -> Run:
        return make_run(function_of(impl), self.inputs)

    def check(self, impl: str, run: Run) -> None:
        if self._ruler is None:
            case = self.problem.case
            long = case.B * case.N * case.M > 20 * MOST_SCORES
            self._ruler = LongRuler(self) if long else Ruler(case, self.problem.torch_dtype)
        results = dict(zip(RESULTS, run()))  # a forward gives `out` alone
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


def to_job(workload: Workload, impl: str) -> dict[str, Any]:
    """A workload and an implementation as JSON, for another process."""
    problem = workload.problem
    case = dataclasses.asdict(problem.case)
    return {
        "op": workload.op,
        "case": case,
        "dtype": problem.dtype,
        "direction": problem.direction,
        "impl": impl,
    }


def problem_of(job: dict[str, Any]) -> Problem:
    """The problem of a job that came as JSON."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in job["case"].items()}
    return Problem(Case(**fields), job["dtype"], job["direction"])
