"""`torch.nn.MultiheadAttention` and its drop-in, weights shared, on the shapes of the registry.

Width is H * D on both sides. The padding of ragged cases comes as a boolean key padding mask, for
all alike. `eager` is torch's module with its default arguments, `sdpa` the same with
`need_weights=False`, `compile` is `torch.compile` of that, `mmfast` the drop-in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import mmfast.nn
from mmfast.testing import tolerance

from .impls import Problem, Run, freshly_compiled
from .workloads import WrongResultError

OP = "MultiheadAttention"


class Module:
    """The layer on one problem: the projections of q, k, v and out are part of what is timed."""

    op = OP

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self._device = problem, device
        case, dtype = problem.case, problem.torch_dtype
        generator = torch.Generator().manual_seed(case.N * 8191 + case.M)

        def make(length: int) -> Tensor:
            x = torch.randn(case.B, length, case.H * case.D, generator=generator)
            return x.to(device=device, dtype=dtype).requires_grad_(problem.trains)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = nn.MultiheadAttention(case.H * case.D, case.H, batch_first=True)
        self._torch = module.to(device=device, dtype=dtype)
        self._mmfast = mmfast.nn.MultiheadAttention.from_torch(self._torch)
        self._query, self._context = make(case.N), make(case.M)
        self._dout = make(case.N).detach()
        self._padding = None
        if case.kv_lens is not None:
            lens = torch.tensor(case.kv_lens, device=device)
            self._padding = torch.arange(case.M, device=device) >= lens[:, None]
        self._truth: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def run(self, impl: str) -> Run:
        if impl == "compile":
            return self._call(self._torch, False, freshly_compiled(self._attend))
        module = self._mmfast if impl == "mmfast" else self._torch
        return self._call(module, impl == "eager", self._attend)

    def _attend(
        self, module: nn.Module, query: Tensor, context: Tensor, mask: Tensor | None, weights: bool
    ) -> Tensor:
        out, _ = module(query, context, context, key_padding_mask=mask, need_weights=weights)
        return out

    def _call(self, module: nn.Module, weights: bool, attend: Callable[..., Tensor]) -> Run:
        inputs = (module, self._query, self._context, self._padding, weights)
        wanted = (self._query, self._context, *module.parameters())

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(*inputs),)

        def forward_backward() -> tuple[Tensor, ...]:
            out = attend(*inputs)
            return (out, *torch.autograd.grad(out, wanted, self._dout))

        return forward_backward if self.problem.trains else forward

    def check(self, impl: str, run: Run) -> None:
        """Against the same module in float64, at most a few times as far off as torch's own."""
        if self._truth is None:
            self._truth = self._exact(), self.run("eager")()
        judge_plainly(f"{impl} on {OP} {self.problem.case.name}", run(), *self._truth)

    def _exact(self) -> tuple[Tensor, ...]:
        twin = copy.copy(self)
        twin._torch = copy.deepcopy(self._torch).double()
        twin._dout = self._dout.double()
        trains = self.problem.trains
        twin._query = self._query.detach().double().requires_grad_(trains)
        twin._context = self._context.detach().double().requires_grad_(trains)
        return twin._call(twin._torch, False, twin._attend)()

    def least_s(self) -> None:
        """Not modelled: how much of the projections is needed is for a planner to say."""
        return None

    def clone(self) -> None:
        return None


def judge_plainly(
    who: str,
    got: Sequence[Tensor],
    exact: Sequence[Tensor],
    peer: Sequence[Tensor],
    scalars: float = 0.0,
) -> None:
    """Raises WrongResultError unless the largest error of `(out, *gradients)` is at most that of
    eager times the tolerance's factor, plus a few roundings of the largest value (of at least
    `scalars` where a result is one number)."""
    for index, (mine, true, usual) in enumerate(zip(got, exact, peer)):
        factor = tolerance.GRADIENT_FACTOR if index else tolerance.FORWARD_FACTOR
        true = true.detach()
        error = float((mine.detach() - true).abs().max())
        expected = float((usual.detach() - true).abs().max())
        size = max(float(true.abs().max()), scalars if true.numel() == 1 else 0.0)
        floor = 2 * tolerance.SUM_ROUNDINGS * torch.finfo(mine.dtype).eps * size
        if not error <= factor * expected + floor:  # NaN compares false
            off = f"off by {error:.3g}, eager by {expected:.3g}"
            raise WrongResultError(f"{who}: result {index} is {off}")
