"""The Triton kernels for keys that are the values compile for every target, and fit it.

Modelled, not measured: registers, spills, shared memory and tensor instructions of what the
launchers launch, read from the machine code.
"""

from __future__ import annotations

from typing import Any

import pytest
from triton_helpers import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import amdgcn
import gpu_model
import sass
from attention_problems import Problem, Shape
from attention_report import SPILLS, TARGETS
from triton_report import DTYPES, Launch, compiled

POOL = Shape(8, 12, 1, 577, 768)
QUERIES = Shape(64, 12, 32, 257, 1408)
KERNELS = {
    "fwd": ("shared_scores", "shared_products"),
    "bwd": ("rows", "shared_pairs", "shared_products", "shared_keys"),
}
UNITS = {"HMMA", "HGMMA", "tcgen05", "MFMA"}


def name_of(launch: Launch) -> str:
    return launch.kernel.__name__.removeprefix("cross_attention_").removesuffix("_kernel")


def faults(launch: Launch, target: str, dtype: str) -> list[str]:
    """What is wrong with the code of a kernel."""
    code: Any = compiled(launch, TARGETS[target])
    if target.startswith("gfx"):
        program, usage = amdgcn.read(code.asm["amdgcn"])
    else:
        program, usage = sass.read(code.asm["cubin"])
    found = []
    spills = sum(one.kind in SPILLS for one in program.instructions)
    # Outside of the loop; float32 by parts holds every operand twice.
    if spills > (4 if dtype == "bf16" else 16):
        found.append(f"{spills} spills")
    limit = gpu_model.CHIPS[target].program_shared * 1024
    if code.metadata.shared > limit:
        found.append(f"{code.metadata.shared} bytes of shared memory, {limit} there are")
    units = {one.tensor.unit for one in program.instructions if one.tensor}
    if name_of(launch) != "rows" and not units & UNITS:
        found.append("no tensor instructions")
    if launch.constants["num_warps"] * 32 * usage.registers > 65536:
        found.append(f"{usage.registers} registers")
    return [f"{name_of(launch)} {dtype} {target}: {text}" for text in found]


def all_faults(way: str, shape: Shape, dtype: str, target: str) -> list[str]:
    launches = Problem(way, "shared", shape).launches(DTYPES[dtype], target, None)
    names = [name for one in launches if (name := name_of(one)) != "column_sums"]
    assert tuple(names) == KERNELS[way]
    return [
        text for one in launches if name_of(one) in names for text in faults(one, target, dtype)
    ]


@pytest.mark.parametrize(("way", "target"), [("fwd", "sm_90"), ("bwd", "sm_80"), ("fwd", "gfx942")])
def test_attention_pooling(way: str, target: str) -> None:
    assert all_faults(way, POOL, "bf16", target) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", KERNELS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_target(way: str, dtype: str, target: str) -> None:
    assert all_faults(way, POOL, dtype, target) + all_faults(way, QUERIES, dtype, target) == []
