"""Runs a piece of Python in a process of its own, against this tree or a changed copy of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(
    *arguments: str,
    package: Path | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`python *arguments` outside the tree; `package` is a folder from `overlay.make_overlay`.

    MMFAST_* variables of this process are not passed on; those of `environment` are.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MMFAST_")}
    kept["PYTHONPATH"] = str(package or ROOT)
    kept.update(environment or {})
    return subprocess.run(
        [sys.executable, *arguments],
        cwd="/",
        env=kept,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
