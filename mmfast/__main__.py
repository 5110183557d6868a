"""`python -m mmfast info`: what is installed, what this machine can run, and what is missing.

`python -m mmfast tune` measures what is chosen by time on this machine (mmfast/_tune.py).

Tables with the package `rich` (`pip install "mmfast[cli]"`), aligned text without it, JSON with
`--json`. Every part that is absent is a line that says so and how to get it; none is an error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence

import torch

from mmfast import _library, _tune, dispatch
from mmfast._version import __version__
from mmfast.planning import calibration

Rows = list[tuple[str, str]]

ENVIRONMENT = ("MMFAST_BACKEND", "MMFAST_ISA")
"""The variables that change what a run does; those of the build are in the README."""


def collect() -> dict[str, Rows]:
    """Section title -> rows of (name, what was found)."""
    with warnings.catch_warnings():
        # A library that cannot be used is told below; the warning would say it twice.
        warnings.simplefilter("ignore", RuntimeWarning)
        return {
            "Versions": _versions(),
            "Processor": _processor(),
            "Compiled library": _compiled_library(),
            "Backends": _backends(),
            "Tuning": _tune.rows(),
            "Environment": [(name, os.environ.get(name, "not set")) for name in ENVIRONMENT],
        }


def _versions() -> Rows:
    return [
        ("mmfast", __version__),
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or "none: a CPU build of torch"),
        ("triton", _installed("triton", "pip install triton")),
        ("Python", platform.python_version()),
        ("system", f"{platform.system()} {platform.machine()}"),
    ]


def _installed(distribution: str, remedy: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed; {remedy}"


def _processor() -> Rows:
    rows = [
        ("model", calibration.processor()),
        ("processors", str(os.cpu_count())),
        ("torch threads", str(torch.get_num_threads())),
    ]
    try:
        from mmfast import _pyb  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        return [*rows, ("features", "unknown without the optional mmfast._pyb; make build")]
    able = [name for name, has in _pyb.processor_features().items() if has]
    return [*rows, ("features", ", ".join(able) or "none of those that mmfast uses")]


def _compiled_library() -> Rows:
    status = _library.status()
    if not status.loaded:
        rows = [("status", f"not in use: {status.reason}")]
        return [*rows, ("path", status.path)] if status.path else rows
    rows = [
        ("status", "loaded"),
        ("path", str(status.path)),
        ("instruction sets", ", ".join(_library.isa_available())),
        ("in use", str(_library.isa_current())),
    ]
    for name, value in _library.build_info().items():
        if not name.startswith("cuda"):
            rows.append((f"built: {name}", str(value)))
    return [*rows, *_cuda_kernels()]


def _cuda_kernels() -> Rows:
    """What the library holds for GPUs, and whether it can be used here."""
    codes, ptx = _library.cuda_code()
    if not codes and not ptx:
        return [("CUDA kernels", f"none; {_library.HOW_TO_GET_CUDA}")]
    toolkit = _library.build_info().get("cuda_version")
    held = f"machine code for {codes or 'no GPU'}, PTX for {ptx or 'none'}, of CUDA {toolkit}"
    return [("CUDA kernels", held), ("CUDA kernels in use", _cuda_use())]


def _cuda_use() -> str:
    if torch.version.hip is not None:
        return "no: this torch is a ROCm build"
    if torch.version.cuda is None:
        return "no: this torch is a CPU build; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "no: torch finds no GPU or no driver for one; nvidia-smi shows what the system has"
    devices = []
    for index in range(torch.cuda.device_count()):
        reason = _library.no_code_for(torch.cuda.get_device_capability(index))
        devices.append(f"{torch.cuda.get_device_name(index)}: {reason or 'yes'}")
    return "; ".join(devices)


def _backends() -> Rows:
    return [
        (f"{offer.op} on {offer.backend}", offer.reason or "available")
        for offer in dispatch.explain()
    ]


def _print_tables(sections: dict[str, Rows]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_text(sections)
        print('\nTables instead of text: pip install "mmfast[cli]"')
        return
    console = Console()
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    for title, rows in sections.items():
        table = Table(title=title, title_justify="left", show_header=False, expand=False)
        table.add_column(min_width=width, style="bold")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, Text(value))
        console.print(table)


def _print_text(sections: dict[str, Rows]) -> None:
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    for number, (title, rows) in enumerate(sections.items()):
        print(("\n" if number else "") + title)
        for name, value in rows:
            print(f"  {name:<{width}}  {value}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mmfast", description="mmfast on this machine")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, processor, library, backends")
    info.add_argument("--json", action="store_true", help="for programs and bug reports")
    _tune.add_parser(commands)
    given = parser.parse_args(arguments)
    if given.command == "tune":
        return _tune.main(given)
    sections = collect()
    if given.json:
        print(json.dumps({title: dict(rows) for title, rows in sections.items()}, indent=2))
    else:
        _print_tables(sections)
    return 0


if __name__ == "__main__":
    sys.exit(main())
