"""The host library with faults planted in the CUDA kernels: does the harness find them?

csrc is copied to build/planted-<name>, pieces of text are replaced in the copy, and a second
library is built from it, with ops of its own. It holds every fault of its list, each behind a
switch, so that one build serves them all:

    FAULTS = Faults("gates", ("glu",), Fault("past_the_end", "cuda/rows.cuh", "i < left",
                                             "i < left + (PLANTED ? 1 : 0)"))
    with FAULTS.switched_on("past_the_end"):
        FAULTS.op("glu_fwd")(...)
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

# Which of the planted faults is on; 0 is none. In the one header that every file includes.
_SWITCH_HEADER = "common/dtype.h"
_SWITCH = """
extern "C" {{
__attribute__((visibility("default"))) inline int {name} = 0;
}}
"""


class Fault(NamedTuple):
    """`old`, which csrc/`file` has exactly once, becomes `new`; PLANTED in it is the switch."""

    name: str
    file: str
    old: str
    new: str


class Faults:
    """The faults of some ops. `ops` are the beginnings of the names of files that take part.

    `edits` are made in any case: for leaving out what a fault does not need.
    """

    def __init__(
        self, name: str, ops: tuple[str, ...], *faults: Fault, edits: tuple[Fault, ...] = ()
    ) -> None:
        self.name, self.ops, self.faults, self.edits = name, ops, faults, edits
        self._switch = f"mmfast_planted_{name}"

    @property
    def names(self) -> list[str]:
        return [fault.name for fault in self.faults]

    @functools.lru_cache(maxsize=4)  # noqa: B019  one object a test module
    def build(self, mode: str) -> Path:
        """The library of a mode: plain, asan, tsan. Skips where nothing can be compiled."""
        import host_build
        import native_build

        try:
            native_build.find_compiler()
        except native_build.MissingToolError as missing:
            pytest.skip(str(missing))
        csrc = self._write()
        options = host_build.HostOptions(mode, f"planted_{self.name}", csrc, self.ops)
        return host_build.build_options(options)

    def _write(self) -> Path:
        """The copy of csrc. A file that is as it should be keeps its time, and its object."""
        texts = {}
        for path in sorted((ROOT / "csrc").rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
                texts[str(path.relative_to(ROOT / "csrc"))] = path.read_text(encoding="utf-8")
        for number, fault in enumerate((*self.faults, *self.edits), start=1):
            text = texts[fault.file]
            if text.count(fault.old) != 1:
                pytest.fail(
                    f"csrc/{fault.file} has the piece of source that the fault {fault.name!r} "
                    f"replaces {text.count(fault.old)} times, not once; say anew where it goes:\n"
                    f"{fault.old}"
                )
            switch = f"({self._switch} == {number})"
            texts[fault.file] = text.replace(fault.old, fault.new.replace("PLANTED", switch))
        first = "#pragma once\n"
        defined = first + _SWITCH.format(name=self._switch)
        texts[_SWITCH_HEADER] = texts[_SWITCH_HEADER].replace(first, defined, 1)
        csrc = ROOT / "build" / f"planted-{self.name}" / "csrc"
        for name, text in texts.items():
            path = csrc / name
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        for path in csrc.rglob("*"):  # sources that are there no more
            if path.is_file() and str(path.relative_to(csrc)) not in texts:
                path.unlink()
        return csrc

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _library(self) -> ctypes.CDLL:
        path = self.build("plain")
        torch.ops.load_library(str(path))
        handle = ctypes.CDLL(str(path))
        handle.mmfast_host_seed.argtypes = [ctypes.c_uint64]
        return handle

    def op(self, name: str) -> Any:
        """`torch.ops.mmfast_host_planted_<name>.<op>` of the plain library."""
        self._library()
        return getattr(getattr(torch.ops, f"mmfast_host_planted_{self.name}"), name).default

    def seed(self, number: int) -> None:
        self._library().mmfast_host_seed(number)

    def multiprocessors(self, number: int) -> None:
        """What launchers of the plain library plan for: few of them split no sums."""
        self._library().mmfast_host_device(number, 80, 163 * 1024)

    @contextmanager
    def switched_on(self, name: str) -> Iterator[None]:
        """Within this context the plain library has the fault `name`."""
        switch = ctypes.c_int.in_dll(self._library(), self._switch)
        switch.value = 1 + self.names.index(name)
        try:
            yield
        finally:
            switch.value = 0

    def tried(
        self, name: str, is_right: Callable[[], bool], schedules: int
    ) -> tuple[int, list[str]]:
        """In how many of so many schedules the result is right with the fault `name`, and what the
        harness reported in the others. Without the fault each has to be right.
        """
        right, reports = 0, []
        for number in range(schedules):
            torch.manual_seed(number)
            self.seed(number)
            assert is_right()
            self.seed(number)
            with self.switched_on(name):
                try:
                    right += is_right()
                except RuntimeError as report:
                    reports.append(str(report))
        return right, reports

    def run(self, mode: str, name: str | None, script: str) -> subprocess.CompletedProcess[str]:
        """Runs Python code under a sanitizer, with the fault `name` or none.

        In the code `ops` are the library's ops. Modules of the tests can be imported.
        """
        import sanitize

        library = self.build(mode)
        folder = ROOT / "build" / f"planted-{self.name}"
        number = 0 if name is None else 1 + self.names.index(name)
        head = (
            "import ctypes, torch\n"
            "torch.set_num_threads(1)\n"
            f"torch.ops.load_library({str(library)!r})\n"
            f"handle = ctypes.CDLL({str(library)!r})\n"
            f"ctypes.c_int.in_dll(handle, {self._switch!r}).value = {number}\n"
            f"ops = torch.ops.mmfast_host_planted_{self.name}\n"
        )
        environment = {
            **sanitize.environment(mode, folder),
            "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
        }
        prefix = sanitize.fixed_addresses() if mode == "tsan" else []
        command = [*prefix, sys.executable, "-c", head + script]
        return subprocess.run(
            command, check=False, env=environment, capture_output=True, text=True, timeout=300
        )
