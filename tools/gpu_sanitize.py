"""Runs the `gpu` tests of the CUDA kernels under NVIDIA's compute-sanitizer.

    python tools/gpu_sanitize.py [memcheck racecheck synccheck initcheck] [-- pytest arguments]

Needs a GPU, and the sanitizer, which is part of the CUDA toolkit and a package of PyPI. Only
mmfast's own kernels are watched: with all of torch's it would take hours.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_build
import torch
from native_build import ROOT

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TESTS = ["tests", "-m", "gpu", "-k", "cuda", "-x", "-q", "-p", "no:cacheprovider"]
PADDING = 256
"""Bytes around each allocation that nothing may touch."""
FOUND_ERRORS = 86


def find_sanitizer() -> str | None:
    """PATH, then the toolkit that nvcc is of, then PyPI's package."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    places = []
    with contextlib.suppress(RuntimeError):  # no toolkit: the package may be there
        places.append(cuda_build.toolkit_of(cuda_build.find_nvcc())[0] / "bin")
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        places += Path(folder).glob("cu[0-9]*/bin")
    return next((p for place in places if (p := shutil.which(place / "compute-sanitizer"))), None)


def why_not() -> str | None:
    """Why it cannot be run here, in one sentence."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is not a CUDA build; install one that is "
            "(pip install torch, on a machine with an NVIDIA GPU)"
        )
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU here, or no driver for it; run it on a machine that has one"
    if find_sanitizer() is None:
        return (
            "no compute-sanitizer found; install the CUDA toolkit, or "
            "pip install nvidia-cuda-sanitizer-api"
        )
    return None


def command(sanitizer: str, tool: str, pytest_arguments: list[str]) -> list[str]:
    """One tool over the tests."""
    options = ["--tool", tool, "--kernel-name", "kernel_substring=mmfast"]
    options += ["--error-exitcode", str(FOUND_ERRORS), "--target-processes", "all"]
    if tool == "memcheck":
        options += ["--padding", str(PADDING)]
    return [sanitizer, *options, sys.executable, "-m", "pytest", *TESTS, *pytest_arguments]


def main(arguments: list[str]) -> int:
    """0 when no tool found anything; 1 where it cannot be run or something was found."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    tools, pytest_arguments = arguments[:split] or list(TOOLS), arguments[split + 1 :]
    unknown = [tool for tool in tools if tool not in TOOLS]
    reason = f"there is no tool {unknown[0]}; use {', '.join(TOOLS)}" if unknown else why_not()
    sanitizer = find_sanitizer()
    if reason is not None or sanitizer is None:
        print(f"gpu-sanitize: {reason}", file=sys.stderr)
        return 1
    # torch's own cache of memory would hide an access beyond a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for tool in tools:
        print(f"gpu-sanitize: {tool}", flush=True)
        done = subprocess.run(
            command(sanitizer, tool, pytest_arguments), cwd=ROOT, env=environment, check=False
        )
        if done.returncode != 0:
            failed.append(tool)
    if failed:
        print(f"gpu-sanitize: failed under {', '.join(failed)}; see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
