"""Compiles the Triton kernels ahead of time and reads the machine code: no GPU is needed.

`python tools/triton_report.py` compiles the representative problems for every target and prints
what it finds; `--all` compiles every problem, `--json FILE` writes the findings, and `--docs` makes
the table of docs/triton-kernels.md. The kernels are compiled with exactly the arguments that the
launchers pass for tensors of these shapes: the launch is recorded instead of done.

What is read: registers and spills (cuobjdump, AMD metadata), and every access to global memory with
its width. All kernels go over tiles, so accesses of a thread over elements of a thread is what the
kernel moves for each element; it is held against the bytes that the op cannot do without.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from mmfast.kernels import _launch
from mmfast.kernels._torch_ops import OPS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.knobs import nvidia
from triton.runtime.jit import create_function_from_signature
from triton_problems import Problem, problems

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DOCS = ROOT / "docs" / "triton-kernels.md"
MARK = "<!-- tools/triton_report.py --docs -->"
WIDTH_BITS = {"": 32, "U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


# --- compiling ------------------------------------------------------------------------------------


@dataclass
class Launch:
    """What `_launch.launch` was called with."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches within are recorded instead of done."""
    launches: list[Launch] = []
    run = _launch._run
    _launch._run = lambda *launch: launches.append(Launch(*launch))
    try:
        yield launches
    finally:
        _launch._run = run


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """What Triton would compile for this launch on such a device."""
    kernel, options = launch.kernel, {**launch.constants, "debug": False}
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*launch.args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


@dataclass
class Finding:
    """One kernel of one problem for one target. Accesses: bits -> count, of one thread."""

    op: str
    way: str
    problem: str
    kernel: str
    dtype: str
    target: str
    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    elements: float  # of a tile, for each thread
    rows: int  # of a tile
    ideal: int  # bytes of data tensors, for each element; 0 for the second stage of a sum
    allowed: float  # with the vectors that all rows of a tile share
    moved: float  # bytes by accesses of 8 and 16 bytes, for each element


def inspect(problem: Problem, dtype: str, target: str) -> list[Finding]:
    """Compile what the launcher launches, and read it."""
    with recorded() as launches:
        problem.call(OPS[problem.op][problem.way], DTYPES[dtype])
    assert launches, f"{problem} launched nothing"
    findings = []
    for launch in launches:
        code = compiled(launch, TARGETS[target])
        read = _read_amd if TARGETS[target].backend == "hip" else _read_nvidia
        registers, spills, loads, stores = read(code)
        constants, name = launch.constants, launch.kernel.__name__
        threads = constants["num_warps"] * TARGETS[target].warp_size
        rows = constants.get("BLOCK_N", constants.get("BLOCK_P", 1))
        each = rows * constants["BLOCK_C"] / threads
        moved = sum(
            bits // 8 * count
            for counts in (loads, stores)
            for bits, count in counts.items()
            if bits >= 64
        )
        size, first = DTYPES[dtype].itemsize, name != "column_sums_kernel"
        ideal = problem.units * size * first
        findings.append(
            Finding(
                problem.op, problem.way, problem.name, name, dtype, target, registers, spills,
                code.metadata.shared, loads, stores, each, rows, ideal,
                ideal + first * (problem.vectors * size + problem.sums * 4 / rows), moved / each,
            )
        )  # fmt: skip
    return findings


def _read_nvidia(code: Any) -> tuple[int, int, dict[int, int], dict[int, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = _tool(nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _tool(nvidia.nvdisasm.path, "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = (int(group) for group in found.groups())
    loads: dict[int, int] = {}
    stores: dict[int, int] = {}
    for kind, modifiers in re.findall(r"\b(LDG|STG)((?:\.\w+)*)", sass):
        bits = max(WIDTH_BITS.get(part, 0) for part in modifiers.split(".")[1:] or [""])
        counts = loads if kind == "LDG" else stores
        counts[bits or 32] = counts.get(bits or 32, 0) + 1
    assert "LDG" in sass or "UBLKCP" in sass, "no global load in the code"
    return registers, stack + local, loads, stores


def _tool(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def _read_amd(code: Any) -> tuple[int, int, dict[int, int], dict[int, int]]:
    text = code.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found[1])

    bits = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "short": 16, "dword": 32,
            "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}  # fmt: skip
    loads: dict[int, int] = {}
    stores: dict[int, int] = {}
    found = re.findall(r"^\s*(?:global|buffer|flat)_(load|store)_([a-z0-9]+)", text, re.M)
    for kind, width in found:
        counts = loads if kind == "load" else stores
        counts[bits[width]] = counts.get(bits[width], 0) + 1
    # Scalar registers that spill go to lanes of vector registers, not to memory; those are counted
    # as registers.
    return number("vgpr_count"), number("vgpr_spill_count"), loads, stores


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every problem")
    parser.add_argument("--quick", action="store_true", help="two targets a problem, in turn")
    parser.add_argument("--op", action="append", help="only this op (again for more)")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--json", type=Path, help="write the findings here")
    parser.add_argument("--docs", action="store_true", help="bf16, into docs/triton-kernels.md")
    options = parser.parse_args()
    if options.docs:
        options.dtype = ["bf16"]
    chosen = [p for p in problems() if options.all or p.representative]
    chosen = [p for p in chosen if not options.op or p.op in options.op]
    findings: list[Finding] = []
    for number, problem in enumerate(chosen):
        builds = itertools.product(options.dtype or DTYPES, options.target or TARGETS)
        for dtype, target in quick_builds(number) if options.quick else builds:
            findings += inspect(problem, dtype, target)
        if not options.json and not options.docs:
            for one in findings:
                print(describe(one), flush=True)
            findings.clear()
    if options.docs:
        before, _, rest = DOCS.read_text().partition(MARK)
        DOCS.write_text(before + MARK + "\n" + table(findings) + MARK + rest.partition(MARK)[2])
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in findings]))


def quick_builds(number: int) -> list[tuple[str, str]]:
    """bf16 on sm_90, and one of the other dtypes on one of the other targets, in turn."""
    others = [target for target in TARGETS if target != "sm_90"]
    return [("bf16", "sm_90"), (("fp32", "fp16")[number % 2], others[number % len(others)])]


def describe(one: Finding) -> str:
    """A line of text."""
    return (
        f"{one.op}_{one.way} [{one.problem}] {one.kernel} {one.dtype} {one.target}: "
        f"{one.registers} registers, {one.spills} spills, {one.moved:g} bytes an element "
        f"(ideal {one.ideal}, allowed {one.allowed:g}), loads {one.loads}, stores {one.stores}, "
        f"shared {one.shared}"
    )


def table(findings: list[Finding]) -> str:
    """A row for each kernel of each problem: registers on every target, bytes on sm_90."""
    names = list(dict.fromkeys(one.target for one in findings))
    rows = [
        f"Triton {triton.__version__}, torch {torch.__version__}, 16-bit storage (bf16).\n",
        f"| op | problem | kernel | registers: {', '.join(names)} | spills | bytes / ideal |",
        "|---|---|---|---|---|---|",
    ]
    kernels: dict[tuple[str, ...], list[Finding]] = {}
    for one in findings:
        kernels.setdefault((one.op + "_" + one.way, one.problem, one.kernel), []).append(one)
    for (op, problem, kernel), found in kernels.items():
        registers = ", ".join(str(one.registers) for one in found)
        one = found[0]
        moved = f"{one.moved:g} / {one.ideal}" if one.ideal else ""
        spills = max(each.spills for each in found)
        kernel = kernel.removesuffix("_kernel")
        rows.append(f"| {op} | {problem} | {kernel} | {registers} | {spills} | {moved} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
