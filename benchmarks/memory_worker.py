"""`python -m benchmarks.memory_worker THREADS`: one JSON job a line in, one JSON answer a line out.

The process imports torch and mmfast and runs nothing in parallel, so that it may fork. Every job
runs in a child of its own, whose caches, scratch buffers and thread pool are new: it makes the
inputs, lets the threads and the code pages come in with a tiny problem, resets the system's
high-water mark of resident memory (`/proc/self/clear_refs`, proc(5)), calls once and reads it.
Pages of files that came in meanwhile (program code) are subtracted.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from mmfast import dispatch

from .gates import OPS, Gate, GateProblem
from .impls import Problem
from .modules import Module
from .workloads import Attention

_M_MMAP_THRESHOLD = -3
WORKLOADS: dict[str, tuple[Any, Any]] = {
    Attention.op: (Attention, Problem),
    Module.op: (Module, Problem),
    **dict.fromkeys(OPS, (Gate, GateProblem)),
}
"""By op: the workload, and the problems that it takes."""


def main() -> None:
    """Serve until the input ends."""
    threads = int(sys.argv[1])
    dispatch.explain()  # loads the compiled library here, once, not in every child
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _answer(json.loads(line), threads, writer)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        print(answer or "{}", flush=True)


def _answer(job: dict[str, Any], threads: int, writer: int) -> None:
    try:
        torch.set_num_threads(threads)
        os.write(writer, json.dumps({"bytes": measure(job)}).encode())
    finally:
        os._exit(0)


def measure(job: dict[str, Any]) -> int:
    """Bytes of memory that the call touches beyond what is resident before it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc: give big blocks back at once, so that the mark is theirs
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    workload, problem_type = WORKLOADS[job["op"]]
    problem, impl = problem_type.from_json(job["problem"]), job["impl"]
    cpu = torch.device("cpu")
    workload(problem.tiny(), cpu).run(impl)()
    run = workload(problem, cpu).run(impl)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status()
    kept = run()
    after = _status()
    del kept
    touched = after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"])
    return max(0, touched)


def _status() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        parts[0].rstrip(":"): int(parts[1]) * 1024
        for parts in lines
        if len(parts) == 3 and parts[2] == "kB"
    }


if __name__ == "__main__":
    main()
