"""`python -m mmfast tune`: time on this machine what is chosen by time.

- **Tiles** of the attention kernels, on a GPU. kernels/_tune.py has the file, kernels/_tune_gpu.py
  the timing.
- **Rates** of the planner, on the processor and on a GPU where there is one: what products,
  attention and copies take. planning/calibration.py has the file, planning/measuring.py the timing.

Both are kept in the user's cache directory and used from then on. Nothing is timed unless this is
called.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mmfast.planning import calibration, choice, rates

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = 3  # that are tuned
BUDGET = 600.0
PARTS = ("tiles", "plans")


def why_not() -> str | None:
    """Why there are no tiles to tune here; None where there are."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    return None


def rows() -> list[tuple[str, str]]:
    """What `python -m mmfast info` tells: what is in use, or why nothing is."""
    return [tiles_row(), *(plans_row(device) for device in _devices())]


def tiles_row() -> tuple[str, str]:
    """Which tiles the kernels run with."""
    reason = why_not()
    if reason is not None:
        return "attention kernels", f"as they come: {reason}"
    from mmfast.kernels import _tune

    found = _tune.read(_tune.device_of(torch.device("cuda")))
    if found.why_not is not None:
        return "attention kernels", f"as they come: {found.why_not}"
    path = _tune.path_for(_tune.device_of(torch.device("cuda")))
    return "attention kernels", f"{len(found.choices)} classes of problems tuned, in {path}"


def plans_row(device: torch.device) -> tuple[str, str]:
    """Which rates plans are chosen by on this device."""
    found = calibration.read(calibration.device_of(device))
    if found.why_not is not None:
        return f"plans on {device.type}", f"by assumed rates: {found.why_not}"
    names = ", ".join(found.rates)
    return f"plans on {device.type}", f"by rates measured for {names}, in {found.path}"


def _devices() -> list[torch.device]:
    """Those that plans are made for here."""
    gpu = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_available() else []
    return [torch.device("cpu"), *gpu]


def add_parser(commands: Any) -> None:
    """The subcommand and its options."""
    tune = commands.add_parser(
        "tune", help="time the attention kernels' tiles on this GPU, and what plans are chosen by"
    )
    tune.add_argument("--only", choices=PARTS, help="default: both")
    tune.add_argument(
        "--dtype",
        action="append",
        choices=list(DTYPES),
        help="again for more; default bf16 (and with it fp16), fp32",
    )
    tune.add_argument(
        "--shape", action="append", type=_shape, metavar="B,H,N,M,D",
        help="of tiles, again for more; default: the shapes of the performance suite",
    )  # fmt: skip
    tune.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SECONDS",
        help=f"begin no more tiles after that (default {BUDGET:g})",
    )  # fmt: skip
    other = tune.add_mutually_exclusive_group()
    other.add_argument("--show", action="store_true", help="print what was measured, time nothing")
    other.add_argument("--reset", action="store_true", help="forget what was measured")


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 5 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"five sizes above 0 as B,H,N,M,D, not {text}")
    return sizes


def main(given: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit status."""
    status = 0
    if given.only != "plans":
        status = _tiles(given)
    if given.only != "tiles":
        _plans(given)
        status = 0
    return status


# --- tiles of kernels -----------------------------------------------------------------------------


def _tiles(given: argparse.Namespace) -> int:
    reason = why_not()
    if reason is not None:
        print(f"python -m mmfast tune: {reason}; tiles are timed on one.", file=sys.stderr)
        return 2
    from mmfast.kernels import _tune

    device = _tune.device_of(torch.device("cuda"))
    if given.show:
        return _show(_tune, device)
    if given.reset:
        _tell_deleted(_tune.reset(device), _tune.path_for(device))
        return 0
    return _tune_all(_tune, device, given)


def _tell_deleted(was: bool, path: Any) -> None:
    print(f"deleted {path}" if was else f"there was nothing to forget: no {path}")


def _show(files: Any, device: Any) -> int:
    found = files.read(device)
    if found.why_not is not None:
        print(f"the attention kernels run as they come: {found.why_not}")
        return 0
    print(files.path_for(device))
    for key, chosen in sorted(found.choices.items()):
        kernel, width, itemsize, row_count, keys = key
        gain = f"{chosen.ms:.4g} ms, the default {chosen.default_ms:.4g} ms"
        print(f"  {kernel}, width to {width}, {itemsize} bytes, {row_count} rows, {keys} keys: "
              f"{files.describe(chosen.tile)}; {gain}")  # fmt: skip
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


# --- rates of the planner -------------------------------------------------------------------------


def _plans(given: argparse.Namespace) -> None:
    for device in _devices():
        own = calibration.device_of(device)
        if given.show:
            _show_rates(own)
        elif given.reset:
            _tell_deleted(calibration.reset(own), calibration.path_for(own))
        else:
            _measure_rates(device, own, given)
    choice.forget()


def _show_rates(own: calibration.Device) -> None:
    found = calibration.read(own)
    if found.why_not is not None:
        print(f"plans are chosen by assumed rates: {found.why_not}")
        return
    print(f"{found.path}, {found.threads} threads")
    for dtype, kinds in found.rates.items():
        for kind, row in kinds.items():
            print(f"  {dtype}, {kind}: {_described(row)}")


def _described(row: tuple[float, ...]) -> str:
    """As "12 us a call, 94 GFLOP/s, 0.3 ns an element"."""
    c = rates.Coefficients(*row)
    parts = [f"{c.call * 1e6:.3g} us a call"]
    if c.flop:
        parts.append(f"{1e-9 / c.flop:.3g} GFLOP/s")
    if c.element:
        parts.append(f"{c.element * 1e9:.3g} ns an element")
    if c.score:
        parts.append(f"{c.score * 1e9:.3g} ns a score")
    if c.byte:
        parts.append(f"{1e-9 / c.byte:.3g} GB/s")
    return ", ".join(parts)


def _measure_rates(
    device: torch.device, own: calibration.Device, given: argparse.Namespace
) -> None:
    from mmfast.planning import measuring

    # float16 is taken for bfloat16: its products are those of the same instructions.
    asked = given.dtype or ("bf16", "fp32")
    names = ["bfloat16"] * ("bf16" in asked or "fp16" in asked) + ["float32"] * ("fp32" in asked)
    threads = torch.get_num_threads()
    before = calibration.read(own)
    table = dict(before.rates) if before.threads == threads else {}
    with progress(len(names) * len(measuring.KINDS)) as tell:
        for name in names:

            def told(kind: str, row: tuple[float, ...], name: str = name) -> None:
                tell(f"{device.type}, {name}, {kind}: {_described(row)}")

            table[name] = measuring.measure(getattr(torch, name), device, told)
    path = calibration.write(own, table, threads)
    print(f"rates of plans on {device.type} with {threads} threads, in {path}")


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
