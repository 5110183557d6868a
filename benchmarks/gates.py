"""One gating problem and the ways to compute it: mmfast, its eager twin, and that one compiled.

All take the same tensors, those of the registry. `eager` is what people write by hand
(`mmfast/testing/gate_eager.py`), `compile` is `torch.compile` of it at fixed shapes, `liger` (on
CUDA) takes copies. Forward runs without autograd; forward + backward is the call and the gradients
of every tensor, gates and weights included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

import mmfast
from mmfast import dispatch
from mmfast.testing import gate_eager
from mmfast.testing.gate_cases import GateCase
from mmfast.testing.gate_inputs import GateInputs, make_gate_inputs
from mmfast.testing.gate_tolerance import GateTruth, assert_gate_accurate, gate_truth

from . import liger, machine
from .impls import Run, freshly_compiled
from .problems import BaseProblem
from .workloads import Clone, WrongResultError

OPS = dispatch.GATES
MOST_ELEMENTS = 200_000  # of the float64 reference: a fraction of a second
FUSED: dict[str, Callable[..., Any]] = {op: getattr(mmfast, op) for op in OPS}

Results = dict[str, Tensor]


@dataclass(frozen=True)
class GateProblem(BaseProblem):
    """A case of the registry of gates."""

    case: GateCase
    case_type: ClassVar[type] = GateCase

    def bytes(self, direction_trains: bool | None = None) -> int:
        """That must be moved: each data tensor read or written once in the forward, and once in
        the backward (`GateCase.units`)."""
        trains = self.trains if direction_trains is None else direction_trains
        return self.case.units(trains) * self.case.elements * self.torch_dtype.itemsize

    def tiny(self) -> GateProblem:
        """The same kind of problem with next to no work."""
        return dataclasses.replace(self, case=dataclasses.replace(self.case, shape=(2, 2, 8)))


class GateRuler:
    """The tensors of one case and dtype, and the truth: made once for both directions and for all
    implementations, when first needed.

    A large case is judged on rows spread over all of it (`rows`; None: all). Rows are independent;
    the gradient of a tensor that rows share is judged for an incoming gradient that is 0 in all
    other rows.
    """

    def __init__(self, case: GateCase, dtype: torch.dtype, most: int = MOST_ELEMENTS) -> None:
        self._case, self._dtype = case, dtype
        self.rows: Tensor | None = None
        if case.elements > most:
            B, N, C = case.shape
            self.rows = torch.linspace(0, N - 1, max(2, min(N, most // (B * C)))).long()
        forms = dict(case.sides)
        self.shared = [f"d{name}" for name, form in case.sides if "N" not in form]
        self._by_row = lambda name: "N" in forms.get(name, "N")

    @cached_property
    def inputs(self) -> GateInputs:
        return make_gate_inputs(self._case, self._dtype)

    @cached_property
    def truth(self) -> GateTruth:
        return gate_truth(self._some())

    @cached_property
    def some_incoming(self) -> Results:
        """The incoming gradients, 0 outside the rows that are judged."""
        assert self.rows is not None
        masked = {}
        for name, dout in self.inputs.incoming.items():
            masked[name] = torch.zeros_like(dout)
            masked[name][:, self.rows] = dout[:, self.rows]
        return masked

    def _some(self) -> GateInputs:
        made, rows = self.inputs, self.rows
        if rows is None:
            return made
        B, _, C = self._case.shape
        options = dict(made.options)
        if "N" in self._case.row_mask:
            options["row_mask"] = options["row_mask"][:, rows]
        return GateInputs(
            dataclasses.replace(self._case, shape=(B, len(rows), C)),
            {n: x[:, rows] if self._by_row(n) else x for n, x in made.leaves.items()},
            options,
            {n: x[:, rows] for n, x in made.incoming.items()},
        )

    def check(self, impl: str, results: Results, shared: Results) -> None:
        """Raises WrongResultError unless every result is finite and within the tolerance.

        `results` of the call that will be timed; `shared`: the gradients of what rows share, for
        `some_incoming`, where there are such and not all rows are judged.
        """
        if not all(bool(x.isfinite().all()) for x in results.values()):
            raise WrongResultError(f"{impl}: NaN or infinity in its results")
        some = results
        if self.rows is not None:
            some = {n: x[:, self.rows] for n, x in results.items() if n not in self.shared}
            some |= shared
        exact = {name: self.truth.exact[name] for name in results}  # a forward has no gradients
        try:
            assert_gate_accurate(some, self.truth._replace(exact=exact))
        except AssertionError as error:
            raise WrongResultError(f"{impl}: {error}") from None


class Gate:
    """A gating op of mmfast and its peers on one problem."""

    def __init__(
        self, problem: GateProblem, device: torch.device, ruler: GateRuler | None = None
    ) -> None:
        self.problem, self._device = problem, device
        self.op = problem.case.op
        self._ruler = ruler or GateRuler(problem.case, problem.torch_dtype)
        self._usual: Results | None = None
        self._written: dict[str, Tensor] = {}  # what an implementation writes over in its backward

    @cached_property
    def _leaves(self) -> dict[str, Tensor]:
        trains = self.problem.trains
        leaves = self._ruler.inputs.leaves.items()
        return {n: x.detach().to(self._device).requires_grad_(trains) for n, x in leaves}

    def _arguments(self, leaves: Results) -> tuple[tuple[Any, ...], dict[str, Any]]:
        made = self._ruler.inputs
        options = {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in made.options.items()
        }
        made = dataclasses.replace(made, options=options)
        return made.call(lambda *args, **kwargs: (args, kwargs), leaves)

    @cached_property
    def _douts(self) -> list[Tensor]:
        """What the backward starts from: `check` puts others in their place for a call."""
        return self._on_device(self._ruler.inputs.incoming)

    def _on_device(self, tensors: Results) -> list[Tensor]:
        return [x.to(self._device) for x in tensors.values()]

    def run(self, impl: str) -> Run:
        """A call of the implementation: `(out,)`, `(out, h)`, either with all gradients behind."""
        leaves = self._leaves
        if impl == "mmfast":
            function = FUSED[self.op]
        elif impl == liger.NAME:
            function = liger.function_of(self.problem.case)
            leaves = {
                n: x.detach().clone().requires_grad_(x.requires_grad) for n, x in leaves.items()
            }
            self._written = leaves
        else:
            function = getattr(gate_eager, self.op)
        if impl == "compile":
            function = freshly_compiled(function)
        args, kwargs = self._arguments(leaves)
        wanted, pair, douts = list(leaves.values()), len(self._douts) > 1, self._douts

        def forward() -> tuple[Tensor, ...]:
            out = function(*args, **kwargs)
            return tuple(out) if pair else (out,)

        def forward_backward() -> tuple[Tensor, ...]:
            outs = forward()
            return (*outs, *torch.autograd.grad(outs, wanted, douts))

        return forward_backward if self.problem.trains else forward

    def check(self, impl: str, run: Run) -> None:
        """By the ruler; of a case that it judges in part, the whole against eager, coarsely."""
        ruler = self._ruler
        if impl == liger.NAME:
            with torch.no_grad():
                for name, x in self._written.items():
                    x.copy_(self._leaves[name])
        whole = self._named(run())
        if ruler.rows is None:
            return ruler.check(impl, whole, {})
        shared: Results = {}
        if self.problem.trains and ruler.shared:
            before = list(self._douts)
            self._douts[:] = self._on_device(ruler.some_incoming)
            try:
                again = self._named(run())
            finally:
                self._douts[:] = before
            shared = {name: again[name] for name in ruler.shared}
        ruler.check(impl, whole, shared)
        if self._usual is None:
            self._usual = whole if impl == "eager" else self._named(self.run("eager")())
        judge_coarsely(impl, whole, self._usual)
        return None

    def _named(self, results: tuple[Tensor, ...]) -> Results:
        names = list(self._ruler.inputs.incoming)
        if self.problem.trains:
            names += [f"d{name}" for name in self._leaves]
        return {name: x.detach().cpu() for name, x in zip(names, results, strict=True)}

    def least_s(self) -> float:
        size = self.problem.bytes()
        return size / machine.bandwidth(size, self._device)

    def clone(self) -> Clone:
        """Of a tensor of the result's shape."""
        shape, dtype = self.problem.case.shape, self.problem.torch_dtype
        x = torch.ones(shape, dtype=dtype, device=self._device)  # zeros may be one page, many times
        together = self.problem.bytes(direction_trains=False)
        return Clone(
            run=x.clone,
            units=self.problem.bytes() / (2 * x.numel() * x.element_size()),
            beyond_cache=together >= 2 * machine.last_level_cache(self._device),
        )


def judge_coarsely(impl: str, got: Results, usual: Results) -> None:
    """Raises WrongResultError where a result is off from eager's by more than the square root of
    the dtype's eps, of its largest value: rows left out or computed twice, wherever they are."""
    for name, x in got.items():
        size, off = _largest(usual[name]), _largest(x - usual[name])
        if not off <= torch.finfo(x.dtype).eps ** 0.5 * size:  # NaN compares false
            raise WrongResultError(
                f"{impl}: {name} is off by {off:.3g} from eager's, the largest value is {size:.3g}"
            )


def _largest(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.float(), float("inf")))
