"""Tiles that were measured on the user's own GPU: the file that holds them, and the choosing.

`python -m mmfast tune` measures (`_tune_gpu.py`) and writes; the kernels read with `load(device)`
when they are first launched. Nothing is ever measured by itself. The file is JSON in the user's
cache directory, and only a file that nobody but the user can have written is read. One of other
versions or of another device is not used, and neither is one with a tile that is no candidate: the
kernels then run as they come, and `python -m mmfast info` says why.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
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

from mmfast._version import __version__

SCHEMA = 1
KERNELS = ("fwd", "dq", "dkv")
MOST_BYTES = 1 << 20  # of a file; a class of problems takes 100

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
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-") or "device"
    return base / "mmfast" / f"tuning-{slug}.json"


def read(device: Device) -> Found:
    """What the file of this device holds."""
    path = path_for(device)
    try:
        text, why_not = _read_own(path)
    except FileNotFoundError:
        return Found({}, f"there is no {path}; python -m mmfast tune makes it")
    except (OSError, UnicodeDecodeError) as error:
        return Found({}, f"{path} cannot be read: {error}")
    if why_not is not None:
        return Found({}, why_not, unsafe=True)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Found({}, f"{path} is no JSON: {error}")
    if not isinstance(data, dict):
        return Found({}, f"{path} does not hold an object")
    for name, ours in device.facts().items():
        if data.get(name) != ours:
            why = f"{path} is of {name} {data.get(name)!r}, here it is {ours!r}"
            return Found({}, f"{why}; run python -m mmfast tune again")
    choices: dict[Key, Choice] = {}
    entries = data.get("choices")
    for entry in entries if isinstance(entries, list) else [None]:
        one = _parsed(entry, device)
        if one is None:
            return Found({}, f"{path} holds what is no choice of a tile: {str(entry)[:80]}")
        choices[one[0]] = one[1]
    return Found(choices)


def _read_own(path: Path) -> tuple[str, str | None]:
    """(text, None), or ("", why the file is not to be trusted). What was opened is what is asked.

    A pipe in the file's place does not block.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(number, "rb") as file:
        about = os.fstat(number)
        if not stat.S_ISREG(about.st_mode):
            return "", f"{path} is no regular file; delete it"
        if about.st_uid != os.getuid():
            return "", f"{path} belongs to another user; delete it and run python -m mmfast tune"
        if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return "", f"others may write {path}; delete it and run python -m mmfast tune"
        if about.st_size > MOST_BYTES:
            return "", f"{path} has {about.st_size} bytes, more than tuning writes; delete it"
        return file.read(MOST_BYTES).decode("utf-8"), None


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
    path = path_for(device)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    entries = [
        {
            **dict(zip(("kernel", "width", "itemsize", "rows", "keys"), key)),
            "tile": list(choice.tile), "ms": choice.ms, "default_ms": choice.default_ms,
        }
        for key, choice in sorted(choices.items())
    ]  # fmt: skip
    text = json.dumps({**device.facts(), "choices": entries}, indent=1) + "\n"
    number, name = tempfile.mkstemp(prefix=".tuning-", dir=path.parent)  # 0600
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(number)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


def reset(device: Device) -> bool:
    """Delete the file; whether there was one."""
    path = path_for(device)
    if not os.path.lexists(path):
        return False
    path.unlink()
    return True


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
