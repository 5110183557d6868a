"""Timing of the attention kernels on a GPU, for `python -m mmfast tune`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from mmfast.kernels import _tune, _tuning
from mmfast.kernels._torch_ops import OPS
from mmfast.kernels._tuning import AttentionTile
from torch import Tensor
from triton.errors import TritonError

ROUNDS = 20
FLUSH_BYTES = 256 << 20  # more than any last-level cache


class Problem(NamedTuple):
    """Sizes of a `cross_attention` without options."""

    B: int
    H: int
    N: int
    M: int
    D: int

    def __str__(self) -> str:
        return ", ".join(map(str, self))


def measure(runs: Sequence[Callable[[], None]]) -> list[float]:
    """The median milliseconds of each, by device events, in rounds over all of them.

    Before each run a write of 256 MiB empties the caches, and gives the host time to be ahead.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    pairs: list[list[tuple[Any, Any]]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, events in zip(runs, pairs):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            run()
            end.record()
            events.append((start, end))
    torch.cuda.synchronize()
    return [statistics.median(a.elapsed_time(b) for a, b in events) for events in pairs]


def work(
    problems: Sequence[Problem], dtypes: Sequence[torch.dtype], device: torch.device
) -> Iterator[_tune.Work]:
    """Every kernel on every problem; tensors are made when a problem's turn comes."""
    for problem in problems:
        for dtype in dtypes:
            yield from _of_problem(problem, dtype, device)


def _of_problem(problem: Problem, dtype: torch.dtype, device: torch.device) -> Iterator[_tune.Work]:
    forward, backward = _calls(problem, dtype, device)
    asked: dict[str, tuple[Any, ...]] = {}
    with _asked(asked):
        forward()
        backward()
    for kernel in _tune.KERNELS:
        name, width, itemsize, rows, keys = asked[kernel]
        classes = _tuning._classes(width, itemsize, rows, keys)
        yield _tune.Work(
            f"{kernel} {problem} {str(dtype).removeprefix('torch.')}",
            (kernel, *classes),
            _tuning.attention_candidates(kernel, name, width, itemsize, rows, keys),
            _runner((kernel, *classes), forward if kernel == "fwd" else backward),
        )


@contextmanager
def _asked(asked: dict[str, tuple[Any, ...]]) -> Iterator[None]:
    """Within, `asked` gets what the launchers ask `_tuning.attention_tile`, kernel by kernel."""
    before = _tuning.attention_tile

    def noting(kernel: str, *rest: Any, **options: Any) -> AttentionTile:
        asked[kernel] = rest[:5]
        return before(kernel, *rest, **options)

    _tuning.attention_tile = noting
    try:
        yield
    finally:
        _tuning.attention_tile = before


def _runner(
    key: _tune.Key, call: Callable[[], None]
) -> Callable[[AttentionTile], Callable[[], None]]:
    """tile -> a run of the op in which this kernel takes it, and the others what they take."""

    def runner(tile: AttentionTile) -> Callable[[], None]:
        def run() -> None:
            before = _tuning.TUNED.get(key)
            _tuning.TUNED[key] = tile
            try:
                call()
            except TritonError as error:
                # Too much shared memory or too many registers: a smaller GPU than the table's.
                raise _tune.CannotRun(f"{type(error).__name__}: {error}") from error
            finally:
                del _tuning.TUNED[key]
                if before is not None:
                    _tuning.TUNED[key] = before

        return run

    return runner


def _calls(
    problem: Problem, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of one problem, in the memory layout of a projection."""
    B, H, N, M, D = problem
    generator = torch.Generator(device).manual_seed(0)

    def heads(length: int) -> Tensor:
        shape = (B, length, H, D)
        made = torch.randn(shape, dtype=torch.float32, device=device, generator=generator)
        return made.to(dtype).transpose(1, 2)

    q, k, v, dout = heads(N), heads(M), heads(M), heads(N)
    options, numbers = (None,) * 10, (D**-0.5, 0.0, False, 0, 0, 0)
    ops = OPS["cross_attention"]
    out, lse = ops["fwd"](q, k, v, *options, *numbers)

    def forward() -> None:
        ops["fwd"](q, k, v, *options, *numbers)

    def backward() -> None:
        ops["bwd"](dout, None, q, k, v, out, lse, *options, *numbers, False, True)

    return forward, backward
