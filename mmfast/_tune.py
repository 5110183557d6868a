"""`python -m mmfast tune`: choose the tiles of the attention kernels by timing them on this GPU.

What is chosen is kept in the user's cache directory and used from then on; kernels/_tune.py has the
file, kernels/_tune_gpu.py the timing. Nothing is timed unless this is called.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = 3  # that are tuned
BUDGET = 600.0


def why_not() -> str | None:
    """Why there is nothing to tune here; None where there is."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    return None


def rows() -> list[tuple[str, str]]:
    """What `python -m mmfast info` tells: what is in use, or why nothing is."""
    reason = why_not()
    if reason is not None:
        return [("attention kernels", f"as they come: {reason}")]
    from mmfast.kernels import _tune

    found = _tune.read(_tune.device_of(torch.device("cuda")))
    if found.why_not is not None:
        return [("attention kernels", f"as they come: {found.why_not}")]
    path = _tune.path_for(_tune.device_of(torch.device("cuda")))
    return [("attention kernels", f"{len(found.choices)} classes of problems tuned, in {path}")]


def add_parser(commands: Any) -> None:
    """The subcommand and its options."""
    tune = commands.add_parser("tune", help="time the attention kernels' tiles on this GPU")
    tune.add_argument(
        "--dtype",
        action="append",
        choices=list(DTYPES),
        help="again for more; default bf16 (and with it fp16), fp32",
    )
    tune.add_argument(
        "--shape", action="append", type=_shape, metavar="B,H,N,M,D",
        help="again for more; default: the shapes of the performance suite",
    )  # fmt: skip
    tune.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SECONDS",
        help=f"begin nothing more after that (default {BUDGET:g})",
    )  # fmt: skip
    other = tune.add_mutually_exclusive_group()
    other.add_argument("--show", action="store_true", help="print what was chosen, time nothing")
    other.add_argument("--reset", action="store_true", help="forget what was chosen, time nothing")


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 5 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"five sizes above 0 as B,H,N,M,D, not {text}")
    return sizes


def main(given: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit status."""
    reason = why_not()
    if reason is not None:
        print(f"python -m mmfast tune: {reason}; tiles are timed on one.", file=sys.stderr)
        return 2
    from mmfast.kernels import _tune

    device = _tune.device_of(torch.device("cuda"))
    if given.show:
        return _show(_tune, device)
    if given.reset:
        was = _tune.reset(device)
        print(f"deleted {_tune.path_for(device)}" if was else "there was nothing to forget")
        return 0
    return _tune_all(_tune, device, given)


def _show(files: Any, device: Any) -> int:
    found = files.read(device)
    if found.why_not is not None:
        print(f"the attention kernels run as they come: {found.why_not}")
        return 0
    print(files.path_for(device))
    for key, choice in sorted(found.choices.items()):
        kernel, width, itemsize, row_count, keys = key
        gain = f"{choice.ms:.4g} ms, the default {choice.default_ms:.4g} ms"
        print(f"  {kernel}, width to {width}, {itemsize} bytes, {row_count} rows, {keys} keys: "
              f"{files.describe(choice.tile)}; {gain}")  # fmt: skip
    return 0


def _tune_all(files: Any, device: Any, given: argparse.Namespace) -> int:
    from mmfast.kernels import _tune_gpu

    problems = [_tune_gpu.Problem(*sizes) for sizes in given.shape or default_shapes()]
    dtypes = [DTYPES[name] for name in given.dtype or ("bf16", "fp32")]
    before = files.read(device)
    work = _tune_gpu.work(problems, dtypes, torch.device("cuda"))
    with progress(len(problems) * len(dtypes) * KERNELS) as tell:

        def told(one: Any, choice: Any) -> None:
            tell(f"{one.label}: {_told(files, choice)}")

        outcome = files.choose(work, _tune_gpu.measure, budget=given.budget, told=told)
    for line in outcome.failed:
        print(f"did not run: {line}")
    if outcome.left:
        print(f"no time for {len(outcome.left)} of them; --budget SECONDS gives more")
    path = files.write(device, {**before.choices, **outcome.choices})
    print(f"{len(outcome.choices)} classes of problems chosen, in {path}")
    return 0


def _told(files: Any, choice: Any) -> str:
    if choice is None:
        return "not timed"
    return f"{files.describe(choice.tile)}, {choice.default_ms / choice.ms:.2f}x of the default"


def default_shapes() -> list[tuple[int, ...]]:
    """Those of the performance suite."""
    from mmfast.testing.cases import performance_cases

    shapes = [(case.B, case.H, case.N, case.M, case.D) for case in performance_cases()]
    return list(dict.fromkeys(shapes))


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Gives what is called with a line for each of `total` steps: a bar with rich, or the lines."""
    if importlib.util.find_spec("rich") is None or not sys.stdout.isatty():
        done = iter(range(1, total + 1))

        def tell(line: str) -> None:
            print(f"{next(done):>4}/{total}  {line}", flush=True)

        yield tell
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("tune", total=total)

        def show(line: str) -> None:
            bar.console.print(line, markup=False, highlight=False)
            bar.advance(task)

        yield show
