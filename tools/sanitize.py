"""Runs the tests of the CPU kernels under AddressSanitizer + UBSan, and under ThreadSanitizer.

    python tools/sanitize.py [asan] [tsan] [-- pytest arguments]

For each sanitizer: builds the library a second time with it, puts that library into a tree of links
to the package (build/sanitize-*/tree), preloads the sanitizer into Python (torch itself needs no
rebuild), proves on planted faults that the sanitizer sees what it should, and runs the tests.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import native_build
from native_build import ROOT, SANITIZERS
from overlay import make_overlay

# Arguments of pytest. Under ThreadSanitizer only problems that are large enough to be shared out
# among threads tell anything.
TESTS = {
    "asan": [
        *(f"tests/test_cross_attention{name}.py" for name in ("", "_packed", "_shared")),
        *("tests/test_gates.py", "tests/test_gates_large.py"),
    ],
    "tsan": [
        *("tests/test_cross_attention.py", "tests/test_cross_attention_shared.py"),
        *("tests/test_gates_autograd.py", "-k", "performance_shape or threads"),
    ],
}
# More threads than processors interleave in more ways.
THREADS = {"asan": "2", "tsan": "4"}

# Fault -> the words of the report that has to come; "clean" has to pass.
PLANTED = {
    "asan": {"overflow": "heap-buffer-overflow", "undefined": "misaligned address"},
    "tsan": {"race": "data race"},
}
RUNTIMES = {
    # libstdc++ comes too: AddressSanitizer looks for its __cxa_throw when it starts.
    "asan": ("libasan.so", "libubsan.so", "libstdc++.so.6"),
    "tsan": ("libtsan.so",),
}
RUN_PLANTED = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
library.planted.restype = ctypes.c_int64
print(library.planted(sys.argv[2].encode()))
"""
WHICH_LIBRARY = """
from mmfast import _library
status = _library.status()
print(status.path if status.loaded else status.reason)
"""


def compiler() -> list[str]:
    """The compiler's command."""
    return shlex.split(native_build.find_compiler())


def compile_tool(source: str, target: Path, *flags: str) -> Path:
    """Compiles a file of tools/ into a shared library."""
    command = [*compiler(), "-std=c++20", "-O1", "-g", "-fPIC", "-shared"]
    subprocess.run([*command, str(ROOT / "tools" / source), "-o", str(target), *flags], check=True)
    return target


def build_planted(sanitizer: str, folder: Path) -> Path:
    """The library of planted faults, with the flags of the sanitizer."""
    torch = native_build.find_torch()
    return compile_tool(
        "sanitize_planted.cpp",
        folder / "planted.so",
        *SANITIZERS[sanitizer],
        f"-DTORCH_TARGET_VERSION={native_build.TORCH_TARGET_MACRO}",
        "-isystem",
        str(torch / "include"),
        f"-L{torch / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
    )


def preload(sanitizer: str, folder: Path) -> str:
    """The value of LD_PRELOAD. Exits with one line where the runtime is not installed."""
    paths = []
    for name in RUNTIMES[sanitizer]:
        done = subprocess.run(
            [*compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True
        )
        path = done.stdout.strip()
        if not Path(path).is_absolute():
            sys.exit(f"sanitize: {name} not found; it comes with g++ (clang is not supported here)")
        paths.append(path)
    if sanitizer == "tsan":
        paths.append(str(compile_tool("tsan_openmp.cpp", folder / "tsan_openmp.so", "-ldl")))
        paths += sorted(map(str, (native_build.find_torch() / "lib").glob("libgomp*.so*")))
    return ":".join(paths)


def environment(sanitizer: str, folder: Path) -> dict[str, str]:
    """The environment of a Python under the sanitizer."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # torch, OpenMP and Python are not instrumented: what they do among themselves is not
        # ours to judge. tools/tsan_openmp.cpp tells of the one thing that matters to us.
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:die_after_fork=0",
    }
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("MMFAST_")},
        **options,
        "LD_PRELOAD": preload(sanitizer, folder),
        "PYTHONPATH": str(folder / "tree"),
        "OMP_NUM_THREADS": THREADS[sanitizer],
    }


def fixed_addresses() -> list[str]:
    """A command prefix: ThreadSanitizer fails where the kernel scatters addresses too widely."""
    if shutil.which("setarch"):
        prefix = ["setarch", platform.machine(), "-R"]
        if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode == 0:
            return prefix
    return []


class Session:
    """One sanitizer with its build and its environment."""

    def __init__(self, sanitizer: str) -> None:
        self.sanitizer = sanitizer
        self.folder = ROOT / "build" / f"sanitize-{sanitizer}"
        self.folder.mkdir(parents=True, exist_ok=True)
        options = native_build.Options(
            output=self.folder,
            emulate_amx=native_build.flag("MMFAST_EMULATE_AMX"),
            sanitizer=sanitizer,
        )
        self.library = native_build.build(options)[0]
        self.tree = make_overlay(self.folder / "tree", self.library)
        self.environment = environment(sanitizer, self.folder)

    def python(self, *arguments: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
        """Runs Python under the sanitizer, in the tree; `quiet` keeps the output instead."""
        return subprocess.run(
            [*fixed_addresses(), sys.executable, *arguments],
            cwd=self.tree,
            env=self.environment,
            check=False,
            capture_output=quiet,
            text=True,
        )

    def prove(self) -> None:
        """Exits with one line unless the planted faults are found and faultless code is not."""
        planted = str(build_planted(self.sanitizer, self.folder))
        clean = self.python("-c", RUN_PLANTED, planted, "clean", quiet=True)
        if clean.returncode != 0:
            sys.exit(f"sanitize: {self.sanitizer} objects to faultless code:\n{clean.stderr}")
        for fault, words in PLANTED[self.sanitizer].items():
            done = self.python("-c", RUN_PLANTED, planted, fault, quiet=True)
            if done.returncode == 0 or words not in done.stderr:
                sys.exit(f"sanitize: {self.sanitizer} does not see the planted fault `{fault}`")
            print(f"sanitize: {self.sanitizer} finds the planted fault `{fault}`", flush=True)
        which = self.python("-c", WHICH_LIBRARY, quiet=True)
        if which.stdout.strip() != str(self.tree / "mmfast" / "_C.so"):
            sys.exit(
                "sanitize: the instrumented library is not in use: "
                f"{which.stdout.strip() or which.stderr}"
            )

    def test(self, extra: list[str]) -> bool:
        """Runs the tests. A report of the sanitizer makes the exit status nonzero by itself."""
        tests = [
            str(ROOT / part) if part.endswith(".py") else part for part in TESTS[self.sanitizer]
        ]
        options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        # --capture=sys: the sanitizers write past Python, and nothing may swallow that.
        options += ["--capture=sys", "-p", "no:cacheprovider"]
        return self.python("-m", "pytest", *options, *tests, *extra).returncode == 0


def main() -> int:
    """The command line: 0 when nothing was found."""
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, extra = arguments[:split] or list(SANITIZERS), arguments[split + 1 :]
    unknown = [name for name in names if name not in SANITIZERS]
    if unknown:
        sys.exit(f"sanitize: {unknown[0]!r} is not known; use {', '.join(SANITIZERS)}")
    bad = []
    for name in names:
        try:
            session = Session(name)
        except (native_build.MissingToolError, native_build.CompileError) as error:
            sys.exit(f"sanitize: {error}")
        session.prove()
        if not session.test(extra):
            bad.append(name)
        print(f"sanitize: {name}: {'FAILED' if name in bad else 'clean'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
