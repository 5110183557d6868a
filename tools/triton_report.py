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


# --- the problems -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A call of a launcher. `units`: data tensors that it cannot but read or write once."""

    op: str
    way: str
    name: str
    units: int
    call: Callable[[Callable[..., Any], torch.dtype], Any] = field(compare=False)
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


def _gated_residual() -> Iterator[Problem]:
    gates = {
        "scalar": (1, 1, 1), "channel": (1, 1, C), "item": (B, 1, C), "item scalar": (B, 1, 1),
        "row": (B, N, 1), "position": (1, N, C), "full": (B, N, C),
    }  # fmt: skip
    for name, shape in gates.items():
        full = name == "full"
        for masked in (False, True):
            for act in range(3):
                def forward(launcher, dtype, shape=shape, masked=masked, act=act):
                    x, y = tensor(dtype, B, N, C), tensor(dtype, B, N, C)
                    mask = tensor(torch.bool, B, N) if masked else None
                    return launcher(x, y, tensor(dtype, *shape), mask, act)

                def backward(launcher, dtype, shape=shape, masked=masked, act=act):
                    dout, y = tensor(dtype, B, N, C), tensor(dtype, B, N, C)
                    mask = tensor(torch.bool, B, N) if masked else None
                    return launcher(dout, y, tensor(dtype, *shape), mask, act, True, True)

                label = f"gate {name}, {('tanh', 'sigmoid', 'identity')[act]}"
                label += ", row mask" if masked else ""
                chosen = act == 0 and masked == (name == "item")
                yield Problem(
                    "gated_residual", "fwd", label, 4 if full else 3, forward,
                    chosen and name in ("scalar", "item", "full"),
                )  # fmt: skip
                yield Problem(
                    "gated_residual", "bwd", label, 5 if full else 3, backward,
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

        yield Problem("glu", "fwd", name, 3, forward, act == 0)
        yield Problem("glu", "bwd", name, 5, backward, act in (0, 1))
        yield Problem("glu_packed", "fwd", name, 3, packed)
        yield Problem("glu_packed", "bwd", name, 5, packed_backward, act == 0)


def _fuse() -> Iterator[Problem]:
    forms = {
        "shared": (1, 1, 1), "item": (B, 1, 1), "row": (B, N, 1), "channel": (1, 1, C),
        "full": (B, N, C),
    }  # fmt: skip
    for mode, mode_name in enumerate(("softmax", "sigmoid", "gmu", "gmu pair")):
        for K in (2,) if mode == 3 else (2, 3, 8):
            for form, (lb, ln, lc) in forms.items():
                for absent in (False, True):
                    L = 1 if mode == 3 else K

                    def arguments(dtype, K=K, shape=(lb, ln, L, lc), absent=absent, mode=mode):
                        xs = [tensor(dtype, B, N, C) for _ in range(K)]
                        there = tensor(torch.bool, B, K) if absent else None
                        return xs, tensor(dtype, *shape), there, mode

                    def forward(launcher, dtype, arguments=arguments):
                        return launcher(*arguments(dtype))

                    def backward(launcher, dtype, arguments=arguments):
                        return launcher(tensor(dtype, B, N, C), *arguments(dtype), True, True)

                    label = f"{mode_name} of {K}, logits {form}" + (", absent" if absent else "")
                    wide = L if form == "full" else 0
                    chosen = (mode, K, form, absent) in {
                        (0, 3, "row", True), (0, 3, "shared", False), (3, 2, "full", False),
                        (0, 3, "channel", False),
                    }  # fmt: skip
                    yield Problem("fuse", "fwd", label, K + 1 + wide, forward, chosen)
                    yield Problem("fuse", "bwd", label, 2 * K + 1 + 2 * wide, backward, chosen)


# --- compiling --------------------------------------------------------------------------------------


@dataclass
class Launch:
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
    units: int  # ideal data tensors; 0 for the second stage of a sum
    itemsize: int

    @property
    def wide_bytes(self) -> float:
        """Moved by 16-byte accesses, for each element."""
        count = self.loads.get(128, 0) + self.stores.get(128, 0)
        return 16 * count / self.elements

    @property
    def narrow(self) -> int:
        """Accesses of less than 16 bytes."""
        every = sum(self.loads.values()) + sum(self.stores.values())
        return every - self.loads.get(128, 0) - self.stores.get(128, 0)

    @property
    def ideal_bytes(self) -> int:
        return self.units * self.itemsize


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
        tile = constants.get("BLOCK_N", constants.get("BLOCK_P", 1)) * constants["BLOCK_C"]
        findings.append(
            Finding(
                problem.op, problem.way, problem.name, name, dtype, target, registers, spills,
                code.metadata.shared, loads, stores, tile / threads,
                0 if name == "column_sums_kernel" else problem.units, DTYPES[dtype].itemsize,
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
    parser.add_argument("--op", action="append", help="only this op (again for more)")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--json", type=Path, help="write the findings here")
    options = parser.parse_args()
    chosen = [p for p in problems() if options.all or p.representative]
    chosen = [p for p in chosen if not options.op or p.op in options.op]
    findings: list[Finding] = []
    for problem in chosen:
        for dtype in options.dtype or DTYPES:
            for target in options.target or TARGETS:
                findings += inspect(problem, dtype, target)
        if not options.json:
            for one in findings[-1:]:
                print(describe(one), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in findings]))


def describe(one: Finding) -> str:
    """A line of text."""
    return (
        f"{one.op}_{one.way} [{one.problem}] {one.kernel} {one.dtype} {one.target}: "
        f"{one.registers} registers, {one.spills} spills, {one.wide_bytes:g} of {one.ideal_bytes} "
        f"bytes an element, loads {one.loads}, stores {one.stores}, shared {one.shared}"
    )


if __name__ == "__main__":
    sys.exit(main())
