"""Compiles the Triton kernels ahead of time and reads the machine code: no GPU is needed.

`python tools/triton_report.py` compiles the representative problems for every target and prints a
table; `--all` compiles every problem, `--json FILE` writes what was found, `--docs` writes the
tables of docs/triton-kernels.md. The kernels are compiled with exactly the arguments that the
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTH_BITS = {"": 32, "U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


# --- the problems ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A call of a launcher.

    units: data tensors that it cannot but read or write once. vectors: vectors along the channels
    that all rows of a tile share: a thread reads its part of them for each tile, from the cache
    after the first. sums: float32 vectors that a program writes once for all of its rows.
    """

    op: str
    way: str
    name: str
    units: int
    call: Callable[[Callable[..., Any], torch.dtype], Any] = field(compare=False)
    vectors: int = 0
    sums: int = 0
    representative: bool = False


def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Without memory: a launch that is recorded needs sizes, strides and alignment alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


B, N, C = 8, 512, 1024


def problems() -> Iterator[Problem]:
    """Every path of every launcher, at a shape that is aligned."""
    yield from _gated_residual()
    yield from _glu()
    yield from _fuse()
    yield from _modulate()
    yield from _adaptation_gate()


def _gated_residual() -> Iterator[Problem]:
    gates = {
        "scalar": (1, 1, 1), "channel": (1, 1, C), "item": (B, 1, C), "item scalar": (B, 1, 1),
        "row": (B, N, 1), "position": (1, N, C), "full": (B, N, C),
    }  # fmt: skip
    masked = [(name, act, True) for name in gates for act in (0,)]
    plain = [(name, act, False) for name in gates for act in (0,)]
    plain += [("channel", 1, False), ("channel", 2, False), ("full", 1, True)]
    for name, act, mask in plain + masked:
        shape, full = gates[name], name == "full"

        def forward(launcher, dtype, shape=shape, masked=mask, act=act):
            x, y = tensor(dtype, B, N, C), tensor(dtype, B, N, C)
            mask = tensor(torch.bool, B, N) if masked else None
            return launcher(x, y, tensor(dtype, *shape), mask, act)

        def backward(launcher, dtype, shape=shape, masked=mask, act=act):
            dout, y = tensor(dtype, B, N, C), tensor(dtype, B, N, C)
            mask = tensor(torch.bool, B, N) if masked else None
            return launcher(dout, y, tensor(dtype, *shape), mask, act, True, True)

        label = f"gate {name}, {('tanh', 'sigmoid', 'identity')[act]}"
        label += ", row mask" if mask else ""
        vector = int(name in ("channel", "item", "position"))
        chosen = act == 0 and mask == (name == "item")
        # One position for all items: in the forward each row of a tile has its own gate.
        own = int(name == "position")
        yield Problem(
            "gated_residual", "fwd", label, 3 + full + own, forward, vector - own, 0,
            chosen and name in ("scalar", "item", "full"),
        )  # fmt: skip
        yield Problem(
            "gated_residual", "bwd", label, 5 if full else 3, backward, vector, vector,
            chosen and name in ("channel", "item", "row", "full"),
        )  # fmt: skip


def _glu() -> Iterator[Problem]:
    for act, name in enumerate(("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "identity")):

        def forward(launcher, dtype, act=act):
            return launcher(tensor(dtype, B, N, C), tensor(dtype, B, N, C), act)

        def backward(launcher, dtype, act=act):
            data = [tensor(dtype, B, N, C) for _ in range(3)]
            return launcher(*data, act)

        def packed(launcher, dtype, act=act):
            return launcher(tensor(dtype, B, N, 2 * C), act)

        def packed_backward(launcher, dtype, act=act):
            return launcher(tensor(dtype, B, N, C), tensor(dtype, B, N, 2 * C), act)

        yield Problem("glu", "fwd", name, 3, forward, representative=act == 0)
        yield Problem("glu", "bwd", name, 5, backward, representative=act == 1)
        yield Problem("glu_packed", "fwd", name, 3, packed)
        yield Problem("glu_packed", "bwd", name, 5, packed_backward, representative=act == 0)


def _fuse() -> Iterator[Problem]:
    forms = {
        "shared": (1, 1, 1), "item": (B, 1, 1), "row": (B, N, 1), "channel": (1, 1, C),
        "full": (B, N, C),
    }  # fmt: skip
    modes = ("softmax", "sigmoid", "gmu", "gmu pair")
    runs = [(m, 2 if m == 3 else 3, form, False) for m in range(4) for form in forms]
    runs += [(m, 2 if m == 3 else 3, form, True) for m in range(4) for form in ("row", "full")]
    runs += [(0, K, form, False) for K in (2, 8) for form in ("row", "channel", "full")]
    for mode, K, form, absent in runs:
        L = 1 if mode == 3 else K

        def arguments(dtype, mode=mode, K=K, form=form, L=L, absent=absent):
            xs = [tensor(dtype, B, N, C) for _ in range(K)]
            b, n, c = forms[form]
            return xs, tensor(dtype, b, n, L, c), tensor(torch.bool, B, K) if absent else None, mode

        def forward(launcher, dtype, arguments=arguments):
            return launcher(*arguments(dtype))

        def backward(launcher, dtype, arguments=arguments):
            return launcher(tensor(dtype, B, N, C), *arguments(dtype), True, True)

        label = f"{modes[mode]} of {K}, logits {form}" + (", absent" if absent else "")
        full, vectors = L * (form == "full"), L * (form == "channel")
        chosen = (mode, K, form, absent) in {
            (0, 3, "row", True), (0, 3, "shared", False), (3, 2, "full", False),
            (0, 3, "channel", False),
        }  # fmt: skip
        # The pair's one logit is read for each of its two weights: the second time from a register.
        yield Problem("fuse", "fwd", label, K + 1 + full, forward, vectors, 0, chosen)
        yield Problem(
            "fuse", "bwd", label, 2 * K + 1 + 2 * full, backward, vectors, vectors, chosen
        )


def _modulate() -> Iterator[Problem]:
    for norm, norm_name in enumerate(("none", "layer", "rms")):
        for gated in (False, True):

            def forward(launcher, dtype, norm=norm, gated=gated):
                x, item = tensor(dtype, B, N, C), tensor(dtype, B, 1, C)
                more = (tensor(dtype, B, N, C), item) if gated else (None, None)
                return launcher(x, *more, item, tensor(dtype, B, 1, C), None, None, norm, 1e-6)

            def backward(launcher, dtype, norm=norm, gated=gated):
                x, item = tensor(dtype, B, N, C), tensor(dtype, B, 1, C)
                h, dh = (tensor(dtype, B, N, C) if gated else None for _ in range(2))
                needs = [True, gated, gated, True, True, False, False]
                return launcher(
                    tensor(dtype, B, N, C), dh, x, h, item if gated else None, item, None, None,
                    norm, 1e-6, tensor(dtype, B, 1, C), needs,
                )  # fmt: skip

            label = f"norm {norm_name}, scale and shift" + (", residual and gate" if gated else "")
            yield Problem(
                "modulate", "fwd", label, 4 if gated else 2, forward, 3 if gated else 2, 0,
                norm == 1,
            )  # fmt: skip
            yield Problem(
                "modulate", "bwd", label, 6 if gated else 3, backward, 2 if gated else 1,
                3 if gated else 2, norm == 1,
            )  # fmt: skip


def _adaptation_gate() -> Iterator[Problem]:
    for masked in (False, True):

        def forward(launcher, dtype, masked=masked):
            z, h = tensor(dtype, B, N, C), tensor(dtype, B, N, C)
            mask = tensor(torch.bool, B, N) if masked else None
            return launcher(z, h, tensor(dtype, C), tensor(dtype, C), mask, 1.0, 1e-5)

        def backward(launcher, dtype, masked=masked):
            dout, z, h = (tensor(dtype, B, N, C) for _ in range(3))
            mask = tensor(torch.bool, B, N) if masked else None
            vectors = tensor(dtype, C), tensor(dtype, C)
            return launcher(dout, z, h, *vectors, mask, 1.0, 1e-5, [True] * 4)

        label = "weight and bias" + (", row mask" if masked else "")
        yield Problem("adaptation_gate", "fwd", label, 3, forward, 2, 0, not masked)
        yield Problem("adaptation_gate", "bwd", label, 5, backward, 1, 2, not masked)


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
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return number("vgpr_count"), spills, loads, stores


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every problem")
    parser.add_argument("--quick", action="store_true", help="two targets a problem, in turn")
    parser.add_argument("--op", action="append", help="only this op (again for more)")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--json", type=Path, help="write the findings here")
    options = parser.parse_args()
    chosen = [p for p in problems() if options.all or p.representative]
    chosen = [p for p in chosen if not options.op or p.op in options.op]
    findings: list[Finding] = []
    for number, problem in enumerate(chosen):
        builds = itertools.product(options.dtype or DTYPES, options.target or TARGETS)
        for dtype, target in quick_builds(number) if options.quick else builds:
            findings += inspect(problem, dtype, target)
        if not options.json:
            for one in findings:
                print(describe(one), flush=True)
            findings.clear()
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


if __name__ == "__main__":
    sys.exit(main())
