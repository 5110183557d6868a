"""Tiles that were measured on the user's own GPU: the file that holds them, and the choosing.

`python -m mmfast tune` measures (`_tune_gpu.py`) and writes; the kernels read with `load(device)`
when they are first launched. Nothing is ever measured by itself. What is read and what is not:
mmfast/_user_files.py. A file with a tile that is no candidate is not used either: the kernels then
run as they come, and `python -m mmfast info` says why.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from mmfast.kernels import _tuning
from mmfast.kernels._tuning import AttentionTile

from mmfast import _user_files
from mmfast._version import __version__

SCHEMA = 1
KERNELS = ("fwd", "dq", "dkv")

Key = tuple[str, int, int, int, int]
"""(kernel, width class, itemsize, rows class, keys class), as in `_tuning.TUNED`."""


class Device(NamedTuple):
    """What a measurement holds for. `arch` as `_tuning.arch` names it."""

    name: str
    capability: tuple[int, int]
    arch: str

    def facts(self) -> dict[str, Any]:
        """What a file has to agree with."""
        return {
            "schema": SCHEMA,
            "device": self.name,
            "capability": list(self.capability),
            "triton": triton.__version__,
            "torch": torch.__version__,
            "mmfast": __version__,
        }


class Choice(NamedTuple):
    """The best tile of a class of problems: its time and the default's, in milliseconds."""

    tile: AttentionTile
    ms: float
    default_ms: float


class Found(NamedTuple):
    """What a file holds, or why it is not used; `unsafe` if somebody else may have written it."""

    choices: dict[Key, Choice]
    why_not: str | None = None
    unsafe: bool = False


def device_of(device: torch.device) -> Device:
    """The facts of a GPU."""
    return Device(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        _tuning.arch(device),
    )


def load(device: torch.device) -> dict[Key, AttentionTile]:
    """The tiles for this GPU; empty where there is no file that can be used.

    Warns of a file that somebody else may have written.
    """
    own = device_of(device)
    found = read(own)
    if found.unsafe:
        warnings.warn(f"mmfast: tuned tiles are not used: {found.why_not}", stacklevel=2)
    return {key: choice.tile for key, choice in found.choices.items()}


# --- the file -------------------------------------------------------------------------------------


def path_for(device: Device) -> Path:
    """`mmfast/tuning-<device>.json` in the user's cache directory."""
    return _user_files.path_for("tuning", device.name)


def read(device: Device) -> Found:
    """What the file of this device holds."""
    path = path_for(device)
    held = _user_files.read(path, device.facts())
    if held.why_not is not None:
        return Found({}, held.why_not, held.unsafe)
    choices: dict[Key, Choice] = {}
    entries = held.data.get("choices")
    for entry in entries if isinstance(entries, list) else [None]:
        one = _parsed(entry, device)
        if one is None:
            return Found({}, f"{path} holds what is no choice of a tile: {str(entry)[:80]}")
        choices[one[0]] = one[1]
    return Found(choices)


def _parsed(entry: Any, device: Device) -> tuple[Key, Choice] | None:
    """A choice; None where it is none, or its tile is no candidate of its class."""
    if not isinstance(entry, dict) or entry.get("kernel") not in KERNELS:
        return None
    sizes = [entry.get(name) for name in ("width", "itemsize", "rows", "keys")]
    tile, ms, default_ms = entry.get("tile"), entry.get("ms"), entry.get("default_ms")
    if not isinstance(tile, list) or len(tile) != 4:
        return None
    if not all(type(value) is int and 0 < value < 2**31 for value in (*sizes, *tile)):
        return None
    if not isinstance(ms, int | float) or not isinstance(default_ms, int | float):
        return None
    key: Key = (entry["kernel"], *sizes)
    chosen = AttentionTile(*tile)
    try:
        candidates = _tuning.attention_candidates(key[0], device.arch, *key[1:])
    except KeyError:
        return None  # no such width or itemsize
    if _tuning._classes(*key[1:]) != key[1:]:
        return None
    return (key, Choice(chosen, ms, default_ms)) if chosen in candidates else None


def write(device: Device, choices: Mapping[Key, Choice]) -> Path:
    """Replace the file by one with these choices: whoever reads sees the old or the new one."""
    entries = [
        {
            **dict(zip(("kernel", "width", "itemsize", "rows", "keys"), key)),
            "tile": list(choice.tile), "ms": choice.ms, "default_ms": choice.default_ms,
        }
        for key, choice in sorted(choices.items())
    ]  # fmt: skip
    return _user_files.write(path_for(device), {**device.facts(), "choices": entries})


def reset(device: Device) -> bool:
    """Delete the file; whether there was one."""
    return _user_files.delete(path_for(device))


# --- choosing -------------------------------------------------------------------------------------


@dataclass
class Work:
    """A kernel on a problem, whose candidates are to be timed."""

    label: str
    key: Key
    candidates: Sequence[AttentionTile]
    runner: Callable[[AttentionTile], Callable[[], None]]


class CannotRun(Exception):  # noqa: N818  not an error: the candidate is left out
    """The device does not take this tile, and why."""


Measure = Callable[[Sequence[Callable[[], None]]], Sequence[float]]
"""Runs -> the milliseconds of each, timed side by side."""


@dataclass
class Outcome:
    """What was chosen, what did not run, and what there was no time for."""

    choices: dict[Key, Choice] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def choose(
    work: Iterable[Work],
    measure: Measure,
    *,
    budget: float,
    told: Callable[[Work, Choice | None], None] = lambda work, choice: None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Time the candidates of each piece of work and keep the fastest; the first of equals.

    budget: seconds after which nothing more is begun. `told` hears of each piece that is done.
    """
    outcome = Outcome()
    end = clock() + budget
    for one in work:
        if one.key in outcome.choices:
            told(one, outcome.choices[one.key])
            continue
        if clock() >= end:
            outcome.left.append(one.label)
            told(one, None)
            continue
        runs, able = [], []
        for tile in one.candidates:
            run = one.runner(tile)
            try:
                run()  # compiles
            except CannotRun as reason:
                outcome.failed.append(f"{one.label}, {describe(tile)}: {reason}")
                continue
            runs.append(run)
            able.append(tile)
        choice = None
        if runs:
            times = measure(runs)
            best = min(range(len(runs)), key=times.__getitem__)
            choice = Choice(able[best], float(times[best]), float(times[0]))
            outcome.choices[one.key] = choice
        told(one, choice)
    return outcome


def describe(tile: AttentionTile) -> str:
    """As "64 x 128, 4 warps, 3 stages"."""
    return f"{tile.rows} x {tile.keys}, {tile.warps} warps, {tile.stages} stages"
