"""A second copy of the package tree made of links, with another library in it, or none.

The path of the compiled library is fixed beside the package and no environment variable can change
it. Tests and tools/sanitize.py that need another library therefore make another tree.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_overlay(folder: Path, library: Path | None = None) -> Path:
    """Fills `folder` with the package `mmfast` and returns it, for PYTHONPATH.

    `library` becomes its mmfast/_C.so; None gives an installation without a library.
    """
    package = folder / "mmfast"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (ROOT / "mmfast").iterdir():
        if entry.suffix != ".so" and entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    if library is not None:
        (package / "_C.so").symlink_to(library.resolve())
    return folder
