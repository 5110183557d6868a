"""The Triton kernels compile for every target without a GPU, and the machine code is as intended.

Modelled, not measured: registers, spills and the width of every access to global memory, read from
the compiled code by tools/triton_report.py in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from triton_helpers import requires_triton

pytestmark = requires_triton

ROOT = Path(__file__).resolve().parent.parent
OPS = ("gated_residual", "glu", "glu_packed", "fuse", "modulate", "adaptation_gate")
REGISTERS = 168  # three programs of 128 threads on an SM
REGISTERS_OF_EIGHT = 232  # modalities, in the backward: two


def report(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    target = tmp_path / "findings.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/triton_report.py"), "--json", str(target), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(target.read_text())


def faults(one: dict[str, Any], *, wide: bool) -> list[str]:
    """What is wrong with the code of a kernel; `wide` asks for 16 bytes at each access to data."""
    found = []
    if one["spills"]:
        found.append(f"{one['spills']} spills")
    if one["registers"] > (REGISTERS_OF_EIGHT if " of 8," in one["problem"] else REGISTERS):
        found.append(f"{one['registers']} registers")
    if not one["ideal"] <= one["moved"] <= one["allowed"] and (wide or one["moved"]):
        found.append(f"{one['moved']} bytes an element, {one['ideal']} to {one['allowed']} allowed")
    # A wave of gfx942 has 64 lanes: a tile that is 16 bytes for each of 32 is 8 for each of those.
    eight = one["loads"].get("64") or one["stores"].get("64")
    if wide and one["ideal"] and eight and one["target"] != "gfx942":
        found.append(f"8-byte accesses: {one['loads']}, {one['stores']}")
    return [f"{one['kernel']} [{one['problem']}] {one['dtype']} {one['target']}: " + text
            for text in found]  # fmt: skip


def test_representative_problems(tmp_path: Path) -> None:
    findings = report(tmp_path, "--quick")
    assert {one["op"] for one in findings} == set(OPS)
    assert [text for one in findings for text in faults(one, wide=True)] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("op", OPS)
def test_every_problem(op: str, target: str, tmp_path: Path) -> None:
    findings = report(tmp_path, "--all", "--op", op, "--target", target)
    # Of eight modalities with logits a channel a thread holds fewer elements than 16 bytes.
    bad = [text for one in findings for text in faults(one, wide=" of 8," not in one["problem"])]
    assert bad == []
