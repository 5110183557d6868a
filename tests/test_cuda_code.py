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
SPILLS_OF_GRADIENTS = 24
SPILLS_ON_BLACKWELL = 48

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
    """Instructions in the hot loop: none in the 16-bit forward, and on GPUs before Blackwell none
    in any forward, in 16-bit gradients up to 128 channels and in the gates.
    """
    exact = "float," in one["kernel"]
    if part(one) == "fwd" and not exact:
        return 0
    if one["target"] in ("sm_100", "sm_120"):
        return SPILLS_ON_BLACKWELL
    if part(one) in ("dkv", "dq") and (exact or ",256," in one["kernel"]):
        return SPILLS_OF_GRADIENTS
    if part(one) == "pairs" and one["kernel"].endswith("true,true>"):
        return SPILLS_OF_GRADIENTS
    return 1 if part(one) == "rows" else 0


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


@needs_nvcc
def test_the_forward_at_128_channels(tmp_path: Path) -> None:
    findings = report(
        tmp_path,
        *("--source", "cross_attention_fwd_bf16.cu", "--define", "MMFAST_ONLY_WIDTHS=128"),
        *("--target", "sm_80"),
    )
    assert {(part(one), one["target"]) for one in findings if one["problem"]} == set(LEAST)
    assert [text for one in findings for text in faults(one) + slow(one)] == []


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("target", cuda_code.TARGETS)
def test_every_kernel(target: str, tmp_path: Path) -> None:
    findings = report(tmp_path, "--target", target)
    assert {source.name for source in cuda_code.sources()} == {one["source"] for one in findings}
    assert {part(one) for one in findings if one["problem"]} == {"fwd", "dkv", "dq"}
    assert [text for one in findings for text in faults(one) + slow(one)] == []


GOOD = {
    "kernel": "cross_attention_fwd_kernel<FwdForm<bf16,128,2,false>>", "target": "sm_80",
    "spills": 0, "spills_elsewhere": 3, "tensor": 256, "asynchronous": 8, "problem": "2, 16",
    "occupancy": 2, "tflops": 223.4, "source": "cross_attention_fwd_bf16.cu",
}  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [{"spills": 1}, {"tensor": 0}, {"occupancy": 0}, {"asynchronous": 0}, {"tflops": 215.9}],
    ids=lambda fault: next(iter(fault)),
)
def test_the_gates_close(fault: dict[str, Any]) -> None:
    assert faults(GOOD) + slow(GOOD) == []
    bad = {**GOOD, **fault}
    assert len(faults(bad) + slow(bad)) == 1


def test_names_of_kernels() -> None:
    said = (
        "void mmfast::cross_attention_fwd_kernel<mmfast::FwdForm<mmfast::bf16, 128, 2, (bool)0> >"
        "(mmfast::FwdArgs)"
    )
    assert cuda_code.short(said) == "cross_attention_fwd_kernel<FwdForm<bf16,128,2,0>>"
    assert cuda_code.short("mmfast::column_sums_kernel(mmfast::ColumnSumsArgs)") == (
        "column_sums_kernel"
    )
