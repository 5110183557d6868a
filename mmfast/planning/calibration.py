"""Rates that were measured on the user's own machine: the file that holds them.

`python -m mmfast tune` measures (measuring.py) and writes; rates.py reads when a plan is first
asked for. Which files are read and which are not: mmfast/_user_files.py.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmfast import _user_files
from mmfast._version import __version__
from mmfast.planning.costs import KINDS

SCHEMA = 1
DTYPES = ("float32", "bfloat16")
COEFFICIENTS = 5
MOST_SECONDS = 1.0
"""Of a coefficient: no call, FLOP or byte takes a second."""

Table = dict[str, dict[str, tuple[float, ...]]]
"""dtype -> kind of work -> its coefficients, in the order of `rates.Coefficients`."""


class Device(NamedTuple):
    """What a measurement holds for."""

    name: str
    instructions: str

    def facts(self) -> dict[str, Any]:
        """What a file has to agree with."""
        return {
            "schema": SCHEMA,
            "device": self.name,
            "instructions": self.instructions,
            "torch": torch.__version__,
            "mmfast": __version__,
        }


class Found(NamedTuple):
    """What a file holds, or why it is not used; `unsafe` if somebody else may have written it.

    `threads`: how many torch had when it was measured.
    """

    rates: Table
    threads: int = 1
    path: Path | None = None
    why_not: str | None = None
    unsafe: bool = False


def device_of(device: torch.device) -> Device:
    """The facts of a processor or a GPU."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return Device(torch.cuda.get_device_name(device), f"sm_{major}{minor}")
    return Device(processor(), torch.backends.cpu.get_cpu_capability())


def processor() -> str:
    """The model of this machine's processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def path_for(device: Device) -> Path:
    """`mmfast/plans-<device>.json` in the user's cache directory."""
    return _user_files.path_for("plans", device.name)


def read(device: Device) -> Found:
    """What the file of this device holds."""
    path = path_for(device)
    held = _user_files.read(path, device.facts())
    if held.why_not is not None:
        return Found({}, why_not=held.why_not, unsafe=held.unsafe)
    rates, threads = _parsed(held.data.get("rates")), held.data.get("threads")
    if rates is None or type(threads) is not int or not 0 < threads < 1 << 16:
        return Found({}, why_not=f"{path} holds what are no rates; run python -m mmfast tune again")
    return Found(rates, threads, path)


def _parsed(data: Any) -> Table | None:
    """The rates; None unless each dtype has all kinds of work, each a row of sane numbers."""
    if not isinstance(data, dict) or not data or not set(data) <= set(DTYPES):
        return None
    table: Table = {}
    for dtype, kinds in data.items():
        if not isinstance(kinds, dict) or set(kinds) != set(KINDS):
            return None
        table[dtype] = {}
        for kind, row in kinds.items():
            if not isinstance(row, list) or len(row) != COEFFICIENTS or not all(map(_sane, row)):
                return None
            table[dtype][kind] = tuple(map(float, row))
    return table


def _sane(value: Any) -> bool:
    number = type(value) in (int, float)
    return number and math.isfinite(value) and 0.0 <= value < MOST_SECONDS


def write(device: Device, rates: Mapping[str, Mapping[str, Any]], threads: int) -> Path:
    """Replace the file by one with these rates."""
    data = {**device.facts(), "threads": threads, "rates": rates}
    return _user_files.write(path_for(device), data)


def reset(device: Device) -> bool:
    """Delete the file; whether there was one."""
    return _user_files.delete(path_for(device))
