"""JSON files in the user's cache directory, of which only those are read that the user wrote.

What is measured on a machine is kept there: tiles of kernels (kernels/_tune.py), rates of the
planner (planning/calibration.py). A file is replaced as a whole, so whoever reads sees the old or
the new one; nobody else may read or write it; one that somebody else may have written is not used,
nor is one that was made on another device or with other versions.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

MOST_BYTES = 1 << 20
"""Of a file; what is written takes some kilobytes."""


class Held(NamedTuple):
    """What a file holds, or why it is not used; `unsafe` if somebody else may have written it."""

    data: dict[str, Any]
    why_not: str | None = None
    unsafe: bool = False


def path_for(kind: str, device: str) -> Path:
    """`mmfast/<kind>-<device>.json` in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"
    return base / "mmfast" / f"{kind}-{slug}.json"


def read(path: Path, facts: Mapping[str, Any]) -> Held:
    """The object in the file; `facts` is what it has to agree with."""
    try:
        text, why_not = _read_own(path)
    except FileNotFoundError:
        return Held({}, f"there is no {path}; python -m mmfast tune makes it")
    except (OSError, UnicodeDecodeError) as error:
        return Held({}, f"{path} cannot be read: {error}")
    if why_not is not None:
        return Held({}, why_not, unsafe=True)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Held({}, f"{path} is no JSON: {error}")
    if not isinstance(data, dict):
        return Held({}, f"{path} does not hold an object")
    for name, ours in facts.items():
        if data.get(name) != ours:
            why = f"{path} is of {name} {data.get(name)!r}, here it is {ours!r}"
            return Held({}, f"{why}; run python -m mmfast tune again")
    return Held(data)


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


def write(path: Path, data: Mapping[str, Any]) -> Path:
    """Replace the file by one that holds `data`; the folder is the user's alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    text = json.dumps(data, indent=1) + "\n"
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


def delete(path: Path) -> bool:
    """Delete the file; whether there was one."""
    if not os.path.lexists(path):
        return False
    path.unlink()
    return True
