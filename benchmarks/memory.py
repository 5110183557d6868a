"""Peak extra memory of one call: what it needs beyond its inputs, its result included.

Two measurements; each misses something, so for mmfast the larger of both is reported. For the peers
it is the first alone, in their favour.

- *asked for*: every allocation and release through torch's allocator, from the profiler's memory
  events (on CUDA: the caching allocator's own peak). Exact and repeatable, but blind to memory that
  a library takes from the system itself.
- *touched* (CPU, Linux): the high-water mark of the process's resident memory, in a fresh process
  forked for this one call, so that nothing was cached before (see memory_worker.py). Blind to
  memory that was asked for and never written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .machine import ROOT


def step_peak(run: Callable[[], object], on: torch.device) -> int:
    """Bytes asked for by one call at its worst moment. Call `run` before, so that it is warm."""
    if on.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    return peak_of(_memory_events(run))


def peak_of(events: list[tuple[int, int]]) -> int:
    """The highest sum of the live blocks among `(address, bytes)` events, bytes < 0 a release.

    A release of a block that was not allocated among these events frees nothing that counts.
    """
    live: dict[int, int] = {}
    total = peak = 0
    for address, size in events:
        if size > 0:
            live[address] = size
            total += size
            peak = max(peak, total)
        else:
            total -= live.pop(address, 0)
    return peak


def _memory_events(run: Callable[[], object]) -> list[tuple[int, int]]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        with _without_stderr():  # the profiler's C++ announces its start and stop there
            with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
                kept = run()
            profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    del kept
    found = [event for event in events if event.get("name") == "[memory]"]
    found.sort(key=lambda event: event["ts"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in found]


@contextmanager
def _without_stderr() -> Iterator[None]:
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


class ResidentPeak:
    """The worker process that measures memory touched; `available` is False off Linux.

    with ResidentPeak() as resident: resident.measure(job) -> bytes, or None where unavailable.
    A job is what `impls.to_job` makes.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.available = enabled and _can_reset_peak()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ResidentPeak:
        if self.available:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    f"{__package__}.memory_worker",
                    str(torch.get_num_threads()),
                ],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def measure(self, job: dict[str, Any]) -> int | None:
        """Bytes touched by one call; None where it cannot be known."""
        if self._process is None or self._process.poll() is not None:
            return None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return json.loads(answer).get("bytes") if answer else None


def _can_reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return "VmHWM" in Path("/proc/self/status").read_text() and hasattr(os, "fork")
    except OSError:
        return False
