"""Compiles the attention kernels ahead of time and reads the machine code: no GPU is needed.

`python tools/attention_report.py` compiles a representative set; `--all` every configuration of
`_tuning.ATTENTION` in three dtypes for every target, and every option; `--json FILE` writes the
findings; `--docs` makes the tables of docs/triton-attention.md. The launches are recorded, as
triton_report.py does.

What is read of a kernel: registers, shared memory against what the architecture has, and of its
innermost loops with tensor instructions: those instructions, spills, accesses to global memory and
their width, asynchronous copies. gpu_model.py makes cycles of it: modelled, not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import amdgcn
import gpu_model
import sass
import torch
import triton
from attention_problems import BACKWARD, FORMS, OURS, PRODUCTS, Problem, part_of, shape_of, work_of
from machine_code import Loop, Program
from mmfast.kernels import _tuning
from mmfast.kernels._tuning import AttentionTile
from triton.backends.compiler import GPUTarget
from triton_report import DTYPES, ROOT, Launch, compiled

TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)},
    **{name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")},
}
LOOPS = ("fwd", *BACKWARD)
SPILLS = ("spill.load", "spill.store")
WAYS = ("fwd", "bwd")
DOCS = ROOT / "docs" / "triton-attention.md"


@dataclass
class Finding:
    """One kernel of one problem for one target."""

    kernel: str
    form: str
    rows: int  # queries of a head
    width: int
    dtype: str
    target: str
    tile: tuple[int, ...]  # rows, keys, warps, stages
    registers: int
    stack: int
    shared: int
    shared_limit: int
    spills: int  # instructions, in the hot loop
    spills_elsewhere: int  # in other loops with tensor work: that of masked tiles
    tensor: dict[str, int]  # unit -> instructions on the hot path
    waste: float  # tensor work over what the tile needs
    wide: int  # accesses of 16 bytes to global memory in the hot loop
    narrow: int  # others
    asynchronous: int  # of them: past registers into shared memory
    descriptors: int  # tiles that the tensor memory accelerator fetches
    occupancy: int
    instructions: int  # of the hot loop
    cycles: dict[str, float]
    tflops: float  # modelled
    seconds: float
    limiter: str


def inspect(
    problem: Problem, dtype: str, target: str, tile: AttentionTile | None = None
) -> list[Finding]:
    """Compile what the launcher launches, and read the kernels with a loop of products."""
    launches = problem.launches(DTYPES[dtype], target, tile)
    found = [one for one in launches if part_of(one) in problem.kernels]
    assert found, f"{problem} launched {[part_of(one) for one in launches]}"
    return [examine(problem, one, dtype, target) for one in found]


def examine(problem: Problem, launch: Launch, dtype: str, target: str) -> Finding:
    """Compile one launch for a target, and read it."""
    code = compiled(launch, TARGETS[target])
    chip = gpu_model.CHIPS[target]
    program: Program
    if TARGETS[target].backend == "hip":
        program, usage = amdgcn.read(code.asm["amdgcn"])
    else:
        program, usage = sass.read(code.asm["cubin"])
    loops = program.tensor_loops or program.math_loops
    hot = loops[0]
    warps, form = launch.constants["num_warps"], launch.constants["FORM"]
    size = DTYPES[dtype].itemsize
    work = work_of(launch, problem.shape, size)
    occupancy = gpu_model.resident(usage.registers, code.metadata.shared, warps, chip)
    outside = len(program.instructions) - sum(len(loop.every) for loop in loops)
    model = gpu_model.estimate(hot.hot, outside, warps, occupancy, work, chip)
    ideal = PRODUCTS[part_of(launch)] * form.block_n * form.block_m
    ideal *= form.qk.first + form.qk.second
    return Finding(
        kernel=part_of(launch),
        form=problem.form,
        rows=problem.shape.N,
        width=problem.shape.D,
        dtype=dtype,
        target=target,
        tile=(form.block_n, form.block_m, warps, launch.constants["num_stages"]),
        registers=usage.registers,
        stack=usage.stack,
        shared=code.metadata.shared,
        shared_limit=chip.program_shared * 1024,
        spills=hot.anywhere(*SPILLS),
        spills_elsewhere=sum(loop.anywhere(*SPILLS) for loop in loops[1:]),
        tensor=_units(hot),
        waste=round(gpu_model.products(hot.hot, warps) / ideal, 2),
        wide=_accesses(hot, wide=True),
        narrow=_accesses(hot, wide=False),
        asynchronous=hot.count("cp.async"),
        descriptors=hot.count("tma"),
        occupancy=occupancy,
        instructions=len(hot.hot),
        cycles={pipe: round(cycles) for pipe, cycles in model.budget.pipes.items()},
        tflops=round(model.tflops, 1),
        seconds=model.seconds,
        limiter=model.limiter,
    )


def _units(loop: Loop) -> dict[str, int]:
    units: dict[str, int] = {}
    for tensor, count in loop.tensors.items():
        units[tensor.unit] = units.get(tensor.unit, 0) + count
    return units


def _accesses(loop: Loop, wide: bool) -> int:
    return sum((one.bits == 128) == wide for one in loop.hot if one.kind in ("ldg", "cp.async"))


def describe(one: Finding) -> str:
    """A line of text."""
    tile = "x".join(map(str, one.tile[:2])) + f" {one.tile[2]}w {one.tile[3]}s"
    return (
        f"{one.kernel} [{one.form}] {one.width} {one.dtype} {one.target} {tile}: "
        f"{one.registers} registers, stack {one.stack}, "
        f"{one.spills}+{one.spills_elsewhere} spills in loops, "
        f"{one.shared / 1024:.0f} of {one.shared_limit // 1024} KiB, {one.tensor}, "
        f"waste {one.waste}, {one.wide}+{one.narrow} accesses ({one.asynchronous} async), "
        f"{one.descriptors} by descriptor, "
        f"occupancy {one.occupancy}, {one.instructions} instructions, {one.cycles}, "
        f"modelled {one.tflops} TFLOP/s ({one.limiter})"
    )


def architectures() -> dict[str, list[str]]:
    """Targets of each class of the tuning table."""
    classes: dict[str, list[str]] = {}
    for target in TARGETS:
        classes.setdefault(_tuning.arch_class(target), []).append(target)
    return classes


def problem_of(kernel: str, width: int) -> Problem:
    """What launches a kernel, without options if it can be."""
    form = "bias gradient" if kernel == "pairs" else "dense"
    return Problem("fwd" if kernel == "fwd" else "bwd", form, shape_of(width), kernel)


def everything() -> Iterator[tuple[Problem, str, str, AttentionTile | None]]:
    """Every configuration of the table for every target and dtype, widths between, every option."""
    targets = architectures()
    for (kernel, arch, width, size), tiles in _tuning.ATTENTION.items():
        problem = problem_of(kernel, width)
        for tile in tiles:
            for dtype, target in itertools.product(DTYPES, targets[arch]):
                if DTYPES[dtype].itemsize == size:
                    yield problem, dtype, target, tile
    for way, width, target in itertools.product(WAYS, (72, 96, 192), ("sm_80", "sm_90")):
        yield Problem(way, "dense", shape_of(width)), "bf16", target, None
    for way, form, target in itertools.product(WAYS, FORMS[1:], TARGETS):
        yield Problem(way, form, shape_of(64)), "bf16", target, None


def representative() -> Iterator[tuple[Problem, str, str, AttentionTile | None]]:
    """The headline shapes in bf16, and each option, dtype and other target once, in turn."""
    for way, width, target in itertools.product(WAYS, (64, 128), ("sm_80", "sm_90")):
        yield Problem(way, "dense", shape_of(width)), "bf16", target, None
    yield Problem("bwd", "dense", shape_of(128), "dq"), "bf16", "sm_120", None
    # Too little work for descriptors.
    yield Problem("fwd", "dense", OURS["mllama"]), "bf16", "sm_90", None
    others = [target for target in TARGETS if target not in ("sm_80", "sm_90")]
    for number, target in enumerate(others):
        kernel = LOOPS[number % 3]
        yield problem_of(kernel, 64), "fp16", target, None
    for number, form in enumerate(FORMS[1:]):
        kernel, target = LOOPS[number % 3], ("sm_80", "sm_90")[number // 3 % 2]
        way = "fwd" if kernel == "fwd" else "bwd"
        yield Problem(way, form, shape_of(64), kernel), "bf16", target, None
    yield problem_of("pairs", 64), "bf16", "sm_80", None
    yield problem_of("fwd", 64), "fp32", "sm_90", None
    yield problem_of("dkv", 64), "fp32", "sm_80", None


def defaults() -> Iterator[tuple[Problem, str, str]]:
    """What the table of the docs holds: every kernel at every width in bf16, on every target."""
    targets = architectures()
    for kernel, arch, width, size in _tuning.ATTENTION:
        if size == 2:
            problem = problem_of(kernel, width)
            for target in targets[arch]:
                yield problem, "bf16", target


def docs_tables() -> dict[str, str]:
    """Marker -> table."""
    return {
        "configurations": table([one for each in defaults() for one in inspect(*each)]),
        "shapes": shapes_table(),
    }


def table(findings: list[Finding]) -> str:
    """A row for each kernel, width and target."""
    rows = [
        "| kernel | width | target | tile | registers | spills in the hot loop + in others | "
        "shared KiB | tensor instructions | accesses: 16 bytes / other / TMA | programs an SM | "
        "modelled TFLOP/s | limiter |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in sorted(findings, key=lambda one: (LOOPS.index(one.kernel), one.width)):
        units = ", ".join(f"{count} {unit}" for unit, count in one.tensor.items())
        rows.append(
            f"| {one.kernel} | {one.width} | {one.target} | {tile_name(one)} | {one.registers} | "
            f"{one.spills} + {one.spills_elsewhere} | "
            f"{one.shared / 1024:.0f} of {one.shared_limit // 1024} | {units} | "
            f"{one.wide} / {one.narrow} / {one.descriptors} | {one.occupancy} | "
            f"{one.tflops:.0f} | {one.limiter} |"
        )
    return "\n".join(rows)


def tile_name(one: Finding) -> str:
    """rows x keys, warps, stages."""
    rows, keys, warps, stages = one.tile
    return f"{rows} x {keys}, {warps} w, {stages} st"


def shapes_table() -> str:
    """The forward kernel at the shapes of the benchmark suite, on an A100 and an H100."""
    targets = ("sm_80", "sm_90")
    rows = [
        "| shape | B, H, N, M, D | "
        + " | ".join(f"{gpu_model.CHIPS[target].name}: tile, us, limiter" for target in targets)
        + " |",
        "|---" * (2 + len(targets)) + "|",
    ]
    for name, shape in OURS.items():
        cells = []
        for target in targets:
            (one,) = inspect(Problem("fwd", "dense", shape), "bf16", target)
            cells.append(f"{tile_name(one)}, {one.seconds * 1e6:.1f}, {one.limiter}")
        sizes = f"{shape.B}, {shape.H}, {shape.N}, {shape.M}, {shape.D}"
        rows.append(f"| {name} | {sizes} | {' | '.join(cells)} |")
    return "\n".join(rows)


def write_docs() -> None:
    """Replace what stands between the markers of docs/triton-attention.md."""
    tables, text = docs_tables(), DOCS.read_text()
    versions = f"Triton {triton.__version__}, torch {torch.__version__}, bf16."
    for name, rows in tables.items():
        mark = f"<!-- tools/attention_report.py --docs: {name} -->"
        before, _, rest = text.partition(mark)
        text = f"{before}{mark}\n{versions}\n\n{rows}\n{mark}{rest.partition(mark)[2]}"
    DOCS.write_text(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every configuration and option")
    parser.add_argument("--quick", action="store_true", help="what the tests compile each time")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--kernel", action="append", choices=list(LOOPS))
    parser.add_argument("--json", type=Path, help="write the findings here")
    parser.add_argument("--docs", action="store_true", help="into docs/triton-attention.md")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    findings: list[Finding] = []
    for problem, dtype, target, tile in everything() if options.all else representative():
        if options.target and target not in options.target:
            continue
        if options.kernel and not {*problem.kernels} & {*options.kernel}:
            continue
        for one in inspect(problem, dtype, target, tile):
            findings.append(one)
            if not options.json:
                print(describe(one), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in findings]))


if __name__ == "__main__":
    sys.exit(main())
