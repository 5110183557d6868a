"""How one sample is taken: by the host's clock, or by a device's events.

On a device a sample is the time between two events around the call, as the stream sees it. Before
each call the L2 cache is flushed (a buffer larger than it is written), and the device is kept busy
for as long as the host takes to queue the call: what is measured is the device's work, not the
host's. What a call costs the host is measured by the host's clock, for the smallest problem.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch

from . import machine

Run = Callable[[], object]

MOST_CALLS = 10  # of a device sample: more would fill the queue of launches
LEAD = 1.5  # times the host's time of a call
MOST_LEAD_S = 5e-3
FLUSH_BYTES = 256 << 20


class Clock(Protocol):
    """Takes samples; `calls` says how many calls make one of at least `sample_s`."""

    def sample(self, run: Run, calls: int) -> float:
        """Seconds of a call, the mean of `calls`."""

    def calls(self, once_s: float, sample_s: float) -> int:
        """How many calls a sample needs."""

    def cost_s(self, run: Run, once_s: float, calls: int) -> float:
        """Seconds that `calls` calls take out of the budget."""


class HostClock:
    """`finish` waits for what the calls have begun: on a device, once a sample."""

    def __init__(self, finish: Callable[[], object] | None = None) -> None:
        self._finish = finish

    def sample(self, run: Run, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if self._finish is not None:
            self._finish()
        return (time.perf_counter() - start) / calls

    def calls(self, once_s: float, sample_s: float) -> int:
        return max(1, math.ceil(sample_s / max(once_s, 1e-9)))

    def cost_s(self, run: Run, once_s: float, calls: int) -> float:
        return once_s * calls


class DeviceClock:
    """Events around each call, the cache flushed before it.

    `event()` makes an event with `record()` and `elapsed_time(later)` in milliseconds; `flush()`
    and `busy(seconds)` queue work, `finish()` waits for all of it.
    """

    def __init__(
        self,
        event: Callable[[], Any],
        flush: Callable[[], object],
        busy: Callable[[float], object],
        finish: Callable[[], object],
    ) -> None:
        self._event, self._flush, self._busy, self._finish = event, flush, busy, finish
        self._queueing: dict[Run, float] = {}

    def sample(self, run: Run, calls: int) -> float:
        lead = min(LEAD * self._queueing.get(run, 0.0), MOST_LEAD_S)
        least = math.inf
        pairs = []
        self._finish()
        for _ in range(calls):
            self._flush()
            if lead > 0.0:
                self._busy(lead)
            start, end = self._event(), self._event()
            start.record()
            begun = time.perf_counter()
            run()
            least = min(least, time.perf_counter() - begun)
            end.record()
            pairs.append((start, end))
        self._finish()
        # The least ever seen: a call that waits for the device counts the lead itself.
        self._queueing[run] = min(least, self._queueing.get(run, math.inf))
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3 / calls

    def calls(self, once_s: float, sample_s: float) -> int:
        return min(MOST_CALLS, max(1, math.ceil(sample_s / max(once_s, 1e-9))))

    def cost_s(self, run: Run, once_s: float, calls: int) -> float:
        """Flushes and the wait between samples included: one is taken to see."""
        start = time.perf_counter()
        self.sample(run, calls)
        return time.perf_counter() - start


def clock_of(on: torch.device, by_the_host: bool = False) -> Clock:
    """The clock for runs on this device; `by_the_host`: for what a call costs the host."""
    if on.type != "cuda":
        return HostClock()
    if by_the_host:
        return HostClock(torch.cuda.synchronize)
    buffer = _flush_buffer(on)
    per_second = _cycles_per_second(on)
    return DeviceClock(
        event=lambda: torch.cuda.Event(enable_timing=True),
        flush=buffer.zero_,
        busy=lambda seconds: torch.cuda._sleep(int(seconds * per_second)),
        finish=torch.cuda.synchronize,
    )


def flush_bytes(on: torch.device) -> int:
    """Four times the L2 cache, and at least 256 MiB; 512 on AMD, whose last cache is not the L2."""
    least = FLUSH_BYTES * (2 if torch.version.hip else 1)
    return max(least, 4 * machine.last_level_cache(on))


@lru_cache(maxsize=2)
def _flush_buffer(on: torch.device) -> torch.Tensor:
    return torch.empty(flush_bytes(on) // 4, dtype=torch.int32, device=on)


@lru_cache(maxsize=2)
def _cycles_per_second(on: torch.device) -> float:
    """Of the busy wait, measured: what its cycles are differs between devices."""
    cycles = 10_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / (start.elapsed_time(end) / 1e3)
