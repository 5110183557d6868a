"""What the compiled CUDA kernels are made of, and a model of their speed. Modelled, not measured.

    python tools/cuda_report.py [--target sm_80] [--source 'glu*'] [--json FILE | --docs]

nvcc compiles csrc/cuda for a target; of every kernel the registers, the spills in and outside of
the hot loop, tensor instructions and accesses are read from the machine code (tools/cuda_code.py).
How a kernel is launched for a problem the library itself says: the host library
(tools/host_build.py) runs the launchers of that problem without running the kernels, and tells
grids, threads and shared memory. tools/gpu_model.py makes cycles of both.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

import cuda_code
import gpu_model
import host_build
import torch
from attention_problems import PRODUCTS, Shape, shape_of
from cuda_code import ROOT, Kernel
from gpu_model import CHIPS, Chip, Work

DOCS = ROOT / "docs" / "cuda-kernels.md"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "float": torch.float32}
WIDTHS = (32, 64, 96, 128, 256)
SPILLS = ("spill.load", "spill.store")


@dataclass(frozen=True)
class Launch:
    """One launch of a problem, as the launcher made it."""

    kernel: str
    blocks: int
    threads: int
    shared: int

    @property
    def part(self) -> str:
        """ "fwd", "dkv", "dq", "rows" ... of an attention kernel."""
        return (
            self.kernel.partition("<")[0].removeprefix("cross_attention_").removesuffix("_kernel")
        )


@dataclass(frozen=True)
class Finding:
    """What was read from one kernel for one target, and what was modelled."""

    kernel: str
    source: str
    target: str
    registers: int
    stack: int
    spills: int  # instructions, in the hot loop
    spills_elsewhere: int
    tensor: int  # tensor instructions of the hot loop
    matrices: int  # 8 x 8 matrices that ldmatrix fetches in the hot loop
    asynchronous: int  # copies of 16 bytes from global into shared memory
    instructions: int  # of the hot loop
    problem: str = ""
    threads: int = 0
    shared: int = 0
    occupancy: int = 0
    cycles: dict[str, float] | None = None
    tflops: float = 0.0
    microseconds: float = 0.0
    limiter: str = ""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The host library with every width, and its torch ops."""
    path = host_build.build("plain")
    torch.ops.load_library(str(path))
    handle = ctypes.CDLL(str(path))
    handle.mmfast_host_launches.restype = ctypes.c_char_p
    return handle


def device_of(target: str) -> tuple[int, int, int]:
    """Multiprocessors, compute capability and bytes of shared memory that a block may ask for."""
    chip = CHIPS[target]
    return chip.units, int(target.removeprefix("sm_")), chip.program_shared * 1024


def launches(way: str, shape: Shape, dtype: torch.dtype, target: str) -> list[Launch]:
    """What the attention launchers start for a dense problem on a device of a target."""
    host = library()
    host.mmfast_host_device(*device_of(target))
    host.mmfast_host_dry_run(1)
    host.mmfast_host_clear_counters()
    try:
        _call(way, shape, dtype)
        recorded = json.loads(host.mmfast_host_launches())
    finally:
        host.mmfast_host_dry_run(0)
    made = []
    for one in recorded:
        x, y, z = one["grid"]
        name = cuda_code.short(one["kernel"])
        made.append(Launch(name, x * y * z, one["threads"], one["shared"]))
    return made


def _call(way: str, s: Shape, dtype: torch.dtype) -> None:
    ops = torch.ops.mmfast_host
    q = torch.empty(s.B, s.N, s.H, s.D, dtype=dtype).transpose(1, 2)
    k, v = (torch.empty(s.B, s.M, s.groups, s.D, dtype=dtype).transpose(1, 2) for _ in range(2))
    options = [None] * 10
    scalars = s.D**-0.5, 0.0, False, 0, 0, 0
    if way == "fwd":
        ops.cross_attention_fwd(q, k, v, *options, *scalars)
        return
    lse = torch.empty(s.B, s.H, s.N)
    empty = torch.empty_like(q)
    ops.cross_attention_bwd(empty, None, q, k, v, empty, lse, *options, *scalars, False, True)


def work_of(launch: Launch, shape: Shape, dtype: str, kernel: Kernel) -> Work:
    """The work of an attention kernel with a loop of products."""
    s, part, size = shape, launch.part, DTYPES[dtype].itemsize
    width = next(width for width in WIDTHS if width >= s.D)
    pairs = s.B * s.H * s.N * s.M
    loop = kernel.program.tensor_loops[0]
    macs = pairs * PRODUCTS[part] * width * (3 if dtype == "float" else 1)
    trip = gpu_model.products(loop.hot, launch.threads // 32)
    unit = (s.B * s.H * s.N + s.B * s.groups * s.M) * s.D * size
    other = s.N if part == "dkv" else s.M
    return Work(
        programs=launch.blocks,
        trips=macs / trip / launch.blocks,
        flop=2 * PRODUCTS[part] * pairs * s.D,
        bytes=unit * {"fwd": 2, "dq": 2.5, "dkv": 3}[part],
        l2_bytes=launch.blocks * other * 2 * s.D * size,
    )


def cubins(source: Path, target: str, built: Path | None, *flags: str) -> list[bytes]:
    """Compiled now, or taken from the objects of a build."""
    if built is None:
        return [cuda_code.compile_source(source, target, *flags)]
    return cuda_code.extract(built / source.relative_to(ROOT).with_suffix(".o"), target)


def read(source: Path, target: str, code: list[bytes]) -> list[tuple[Finding, Kernel]]:
    """Every kernel of a source, and what the machine code alone says of it."""
    found = []
    for kernel in [kernel for cubin in code for kernel in cuda_code.read(cubin)]:
        loops = kernel.program.tensor_loops or kernel.program.math_loops
        hot = loops[0] if loops else None
        everywhere = sum(one.kind in SPILLS for one in kernel.program.instructions)
        inner = hot.anywhere(*SPILLS) if hot else 0
        finding = Finding(
            kernel=kernel.name,
            source=source.name,
            target=target,
            registers=kernel.usage.registers,
            stack=kernel.usage.stack,
            spills=inner,
            spills_elsewhere=everywhere - inner,
            tensor=hot.count("tensor") if hot else 0,
            matrices=sum(one.bits // 32 for one in hot.hot if one.kind == "ldsm") if hot else 0,
            asynchronous=hot.anywhere("cp.async") if hot else 0,
            instructions=len(hot.hot) if hot else 0,
        )
        found.append((finding, kernel))
    return found


def modelled(finding: Finding, kernel: Kernel, launch: Launch, shape: Shape, dtype: str) -> Finding:
    """The finding with what the model says of one launch."""
    chip: Chip = CHIPS[finding.target]
    warps = launch.threads // 32
    loops = kernel.program.tensor_loops
    occupancy = gpu_model.resident(kernel.usage.registers, launch.shared, warps, chip)
    outside = len(kernel.program.instructions) - sum(len(loop.every) for loop in loops)
    work = work_of(launch, shape, dtype, kernel)
    model = gpu_model.estimate(loops[0].hot, outside, warps, occupancy, work, chip)
    return replace(
        finding,
        problem=f"{shape.B}, {shape.H}, {shape.N}, {shape.M}, {shape.D}",
        threads=launch.threads,
        shared=launch.shared,
        occupancy=occupancy,
        cycles={pipe: round(cycles) for pipe, cycles in model.budget.pipes.items()},
        tflops=round(model.tflops, 1),
        microseconds=round(model.seconds * 1e6, 1),
        limiter=model.limiter,
    )


def problems() -> Iterator[tuple[str, Shape, str]]:
    """Way, shape and dtype of what is modelled: FlashAttention-2's headline shapes."""
    for width in WIDTHS:
        for way in ("fwd", "bwd"):
            for dtype in ("bf16", "float"):
                yield way, shape_of(width), dtype


def report(
    sources: list[Path], targets: Iterable[str], built: Path | None, *flags: str
) -> list[Finding]:
    """Every kernel of these sources for these targets, modelled where it is launched."""
    found = []
    for target in targets:
        kernels = {
            one.kernel: (one, kernel)
            for source in sources
            for one, kernel in read(source, target, cubins(source, target, built, *flags))
        }
        for way, shape, dtype in problems():
            for launch in launches(way, shape, DTYPES[dtype], target):
                known = kernels.get(launch.kernel)
                exact = f",{shape.D}," in launch.kernel  # not padded to a wider instance
                if known and exact and launch.part in PRODUCTS and not known[0].problem:
                    finding = modelled(*known, launch, shape, dtype)
                    kernels[launch.kernel] = finding, known[1]
        found += [finding for finding, _ in kernels.values()]
    return found


def describe(one: Finding) -> str:
    """A line of text."""
    text = (
        f"{one.kernel} {one.target}: {one.registers} registers, stack {one.stack}, "
        f"{one.spills}+{one.spills_elsewhere} spills, {one.tensor} tensor instructions, "
        f"{one.matrices} matrices, {one.asynchronous} async, {one.instructions} instructions"
    )
    if one.problem:
        text += (
            f"; [{one.problem}] {one.threads} threads, {one.shared / 1024:.0f} KiB, "
            f"occupancy {one.occupancy}, {one.cycles}, modelled {one.tflops} TFLOP/s "
            f"({one.limiter})"
        )
    return text


def attention_table(findings: Iterable[Finding]) -> str:
    """A row for each kernel of attention that was modelled."""
    rows = [
        "| kernel | target | registers | spills | shared KiB | blocks an SM | "
        "tensor instructions | matrices by ldmatrix | modelled TFLOP/s | limiter |",
        "|---" * 10 + "|",
    ]
    for one in findings:
        if one.problem:
            name = one.kernel.removeprefix("cross_attention_").replace("_kernel", "")
            rows.append(
                f"| `{name}` | {one.target} | {one.registers} | "
                f"{one.spills} + {one.spills_elsewhere} | {one.shared / 1024:.0f} | "
                f"{one.occupancy} | {one.tensor} | {one.matrices} | {one.tflops:.0f} | "
                f"{one.limiter} |"
            )
    return "\n".join(rows)


def other_table(findings: Iterable[Finding]) -> str:
    """A row for each other kernel: registers and spills for every target."""
    kernels: dict[str, dict[str, Finding]] = {}
    for one in findings:
        # What f16 is made of is what bf16 is made of.
        if not one.problem and not re.search(r"\bf16\b", one.kernel):
            kernels.setdefault(one.kernel, {})[one.target] = one
    targets = sorted({target for each in kernels.values() for target in each})
    head = [f"{target}: registers, spills" for target in targets]
    rows = [f"| kernel | {' | '.join(head)} |", "|---" * (1 + len(targets)) + "|"]
    for name, each in sorted(kernels.items()):
        cells = [
            f"{each[t].registers}, {each[t].spills} + {each[t].spills_elsewhere}"
            if t in each
            else ""
            for t in targets
        ]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def write_docs(findings: Iterable[Finding]) -> None:
    """Replace what stands between the markers of docs/cuda-kernels.md."""
    found = list(findings)
    text = DOCS.read_text()
    version = f"nvcc {cuda_code.version()}."
    for name, table in (("attention", attention_table(found)), ("others", other_table(found))):
        mark = f"<!-- tools/cuda_report.py --docs: {name} -->"
        before, _, rest = text.partition(mark)
        text = f"{before}{mark}\n{version}\n\n{table}\n{mark}{rest.partition(mark)[2]}"
    DOCS.write_text(text)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(cuda_code.TARGETS))
    parser.add_argument("--source", action="append", default=[], help="pattern of file names")
    parser.add_argument("--define", action="append", default=[], help="-D of nvcc")
    parser.add_argument("--built", type=Path, help="build/native-.../obj: nothing is compiled")
    parser.add_argument("--json", type=Path, help="write the findings here")
    parser.add_argument("--docs", action="store_true", help="into docs/cuda-kernels.md")
    options = parser.parse_args()
    files = [
        file
        for file in cuda_code.sources()
        if not options.source or any(fnmatch(file.name, pattern) for pattern in options.source)
    ]
    flags = [f"-D{one}" for one in options.define]
    targets = options.target or list(cuda_code.TARGETS)
    findings = report(files, targets, options.built, *flags)
    for one in findings:
        print(describe(one))
    if options.docs:
        write_docs(findings)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in findings]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
