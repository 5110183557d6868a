"""The machine code of the CUDA kernels: spills, tensor work, and the modelled speed of the forward.

What is quick compiles the kernels of one width; the slow tests compile every source for every
architecture that the library has code for, with warnings as errors.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the disassembler is part of the triton package")

import cuda_build
import cuda_code

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "cuda_report.py"
HEADLINE = ("fwd_kernel", "dkv_kernel", "dq_kernel")

# Modelled TFLOP/s of bf16 at 128 channels and 8192 queries and keys (tools/cuda_report.py). The
# first is what FlashAttention-2's own kernel gives in the same model (tests/test_gpu_model.py).
LEAST = {("fwd", "sm_80"): 216}


def _has_nvcc() -> bool:
    try:
        return shutil.which(cuda_build.find_nvcc()) is not None
    except RuntimeError:
        return False


needs_nvcc = pytest.mark.skipif(
    not _has_nvcc(), reason="no nvcc: install the CUDA toolkit, or run `make nvcc`"
)


def report(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """What tools/cuda_report.py finds, in a process of its own."""
    target = tmp_path / "findings.json"
    command = [sys.executable, str(TOOL), "--json", str(target), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(target.read_text())


def part(one: dict[str, Any]) -> str:
    """ "fwd", "dkv", "dq" ... of an attention kernel, and the whole name of another."""
    return one["kernel"].partition("<")[0].removeprefix("cross_attention_").removesuffix("_kernel")


def spills_allowed(one: dict[str, Any]) -> int:
    """Instructions in the hot loop."""
    return 0


def faults(one: dict[str, Any]) -> list[str]:
    """What is wrong with the code of a kernel."""
    found = []
    if one["spills"] > spills_allowed(one):
        found.append(f"{one['spills']} spills in the hot loop")
    if part(one) in ("fwd", "dkv", "dq", "pairs") and not one["tensor"]:
        found.append("no tensor instructions in the hot loop")
    if one["problem"] and not one["occupancy"]:
        found.append("no block fits a multiprocessor")
    if part(one) == "fwd" and one["problem"] and not one["asynchronous"]:
        found.append("keys are not copied asynchronously")
    return [f"{one['kernel']} for {one['target']}: {text}" for text in found]


def slow(one: dict[str, Any]) -> list[str]:
    """What a kernel lacks of its modelled TFLOP/s at the headline shape."""
    least = LEAST.get((part(one), one["target"]), 0)
    if "bf16,128" not in one["kernel"] or not one["problem"] or one["tflops"] >= least:
        return []
    return [f"{one['kernel']} for {one['target']}: modelled {one['tflops']} of {least} TFLOP/s"]
