"""Runs tests of the CUDA kernels on the CPU under AddressSanitizer + UBSan, or ThreadSanitizer.

    python tools/host_sanitize.py [asan] [tsan] [-- pytest arguments]

The kernels are built a second time with the sanitizer (tools/host_build.py), Python runs with its
runtime preloaded, and tests/cuda_host.py loads the library of that mode (MMFAST_HOST_MODE). torch
and the rest of the package are as ever: only the kernels are looked at. tests/ does the same for a
few cases in `make test`. MMFAST_HOST_OPS and MMFAST_HOST_WIDTHS hold here as there.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import host_build
import native_build
import sanitize
from native_build import ROOT

MODES = ("asan", "tsan")
TESTS = tuple(
    f"tests/test_cuda_{name}.py"
    for name in (
        "cross_attention",
        "glu",
        "gated_residual",
        "fuse",
        "modulate",
        "adaptation_gate",
    )
)


KEPT = ("MMFAST_HOST_OPS", "MMFAST_HOST_WIDTHS")


@functools.lru_cache
def environment(mode: str) -> dict[str, str]:
    """The environment of a Python that can load the library of `mode`."""
    folder = ROOT / "build" / f"host-{mode}"
    folder.mkdir(parents=True, exist_ok=True)
    found = sanitize.environment(mode, folder)
    # One thread: what runs beside what is decided by fibers, and torch is not looked at.
    found.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", MMFAST_HOST_MODE=mode)
    found.update({name: os.environ[name] for name in KEPT if name in os.environ})
    return found


def python(
    mode: str,
    *arguments: str,
    capture: bool = True,
    timeout: float | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs Python in the repository under the sanitizer's runtime."""
    return subprocess.run(
        [*sanitize.fixed_addresses(), sys.executable, *arguments],
        cwd=ROOT,
        env={**environment(mode), **variables},
        check=False,
        capture_output=capture,
        text=True,
        timeout=timeout,
    )


def pytest(
    mode: str,
    *arguments: str,
    capture: bool = True,
    timeout: float | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs pytest likewise. A report of the sanitizer makes the exit status nonzero by itself."""
    # --capture=sys: the sanitizers write past Python, and nothing may swallow that.
    options = ("-m", "pytest", "--capture=sys", "-p", "no:cacheprovider", *arguments)
    return python(mode, *options, capture=capture, timeout=timeout, **variables)


def main() -> int:
    """The command line: 0 when nothing was found."""
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    modes, extra = arguments[:split] or list(MODES), arguments[split + 1 :]
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        sys.exit(f"host_sanitize: {unknown[0]!r} is not known; use {', '.join(MODES)}")
    bad = []
    for mode in modes:
        try:
            host_build.build(mode)
        except (native_build.MissingToolError, native_build.CompileError) as error:
            sys.exit(f"host_sanitize: {error}")
        if pytest(mode, *(extra or TESTS), capture=False).returncode != 0:
            bad.append(mode)
        print(f"host_sanitize: {mode}: {'FAILED' if mode in bad else 'clean'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
