"""`mmfast.kernels` with a fault planted in its source, for the interpreter.

The package is copied to a folder, pieces of text are replaced in the copy, and the copy is imported
in place of the package: Triton's interpreter reads a kernel's source from its file.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import triton_helpers

import mmfast
from mmfast import dispatch

PACKAGE = "mmfast.kernels"
SOURCE = Path(__file__).resolve().parent.parent / "kernels"


class Edit(NamedTuple):
    """`old` becomes `new` in a function or class of `kernels/file`, which has it exactly once."""

    file: str
    where: str
    old: str
    new: str

    def apply(self, folder: Path) -> None:
        """Changes the file in `folder`; the test fails where there is not one place for it."""
        path = folder / self.file
        text = path.read_text()
        found = re.search(
            rf"^(?:def|class) {self.where}\b.*?(?=^[@#\w\"]|\Z)", text, re.DOTALL | re.MULTILINE
        )
        count = 0 if found is None else found[0].count(self.old)
        if found is None or count != 1:
            pytest.fail(
                f"kernels/{self.file}: {self.where} has the piece of source that this fault "
                f"replaces {count} times, not once; say anew where the fault goes:\n{self.old}"
            )
        changed = found[0].replace(self.old, self.new)
        path.write_text(text[: found.start()] + changed + text[found.end() :])


@contextmanager
def planted(folder: Path, *edits: Edit) -> Iterator[None]:
    """Within `interpreter()`: the Triton backend runs the kernels with these edits.

    `folder` is where they are written; it does not exist before.
    """
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        edit.apply(folder)
    dispatch._load_triton()  # torch ops are defined by the package itself, which lives on
    whole, attribute = triton_helpers._modules(), mmfast.__dict__.get("kernels")
    try:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = mmfast.__dict__["kernels"] = package
        spec.loader.exec_module(package)
        with triton_helpers._patched(dispatch, _triton_kernels=None, _triton_missing=None):
            yield
    finally:
        triton_helpers._modules()
        sys.modules.update(whole)
        mmfast.__dict__["kernels"] = attribute
