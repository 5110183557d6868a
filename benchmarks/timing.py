"""Time several implementations of one problem fairly: interleaved, round by round, in one process.

A round times every implementation once, in an order that rotates, so that a slow moment of a shared
machine hits all of them alike. The ratio of two medians then means something; a single absolute
time on a shared machine does not. How one sample is taken is in clocks.py.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

from .clocks import Clock, Run, clock_of
from .stats import repeats

Result = TypeVar("Result")


class Effort(NamedTuple):
    """How long to measure one group: `budget_s` for all its rounds together, the number of rounds
    between `min_rounds` and `max_rounds`, each sample at least `sample_s` long.

    `settle`: one call goes before every sample, untimed. What others freed in their turns the
    system, or a virtual machine's host, may have taken back: without it calls that allocate large
    tensors pay for getting memory, and those that follow the most wasteful one pay the most.

    `by_the_host`: on a device, what a call costs the host, whose clock is read.
    """

    budget_s: float
    min_rounds: int = 5
    max_rounds: int = 200
    sample_s: float = 0.002
    settle: bool = False
    by_the_host: bool = False


def interleave(
    runs: Mapping[str, Run],
    effort: Effort,
    on: torch.device,
    clock: Clock | None = None,
    *,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds per call of every run, one number a round. `clock`: default is that of the device.

    Short runs are called several times a sample. `warm`: the runs have been called before and take
    long: `min_rounds` of one call each, and nothing else. Raises ValueError when there is nothing
    to time.
    """
    if not runs:
        raise ValueError("interleave: no implementation to time")
    clock = clock or clock_of(on, effort.by_the_host)
    inner = dict.fromkeys(runs, 1)
    cost = 0.0
    for name, run in () if warm else runs.items():
        once = _warm_up(run, clock.sample)
        inner[name] = clock.calls(once, effort.sample_s)
        cost += clock.cost_s(run, once, inner[name] + effort.settle)
    rounds = effort.min_rounds
    if not warm:
        rounds = repeats(cost, effort.budget_s, effort.min_rounds, effort.max_rounds)
    names = list(runs)
    taken: dict[str, list[float]] = {name: [] for name in names}
    with quiet():
        for index in range(rounds):
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                if effort.settle:
                    runs[name]()
                taken[name].append(clock.sample(runs[name], inner[name]))
    return taken


def _warm_up(run: Run, sample: Callable[[Run, int], float]) -> float:
    """Call until caches, allocator and threads have settled; the least time of one call."""
    least = sample(run, 1)
    if least > 0.1:  # verified before: what a first call does once was done then
        return least
    least = sample(run, 1)
    spent, calls = least, 1
    while spent < 0.02 and calls < 20:
        once = sample(run, 1)
        least, spent, calls = min(least, once), spent + once, calls + 1
    return least


def timed(run: Callable[[], Result], on: torch.device) -> tuple[Result, float]:
    """The result of one call and its seconds, the device's work included."""
    if on.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if on.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection in the middle of a sample."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
