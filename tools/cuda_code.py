"""Compiles CUDA sources for one architecture and reads the machine code of their kernels.

nvcc compiles, with the flags of the library; the disassembler is the one inside the triton wheel
(tools/sass.py). No GPU is needed.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import cuda_build
import sass
from machine_code import Program
from triton.knobs import nvidia

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TARGETS = {
    "sm_80": "sm_80",
    "sm_86": "sm_86",
    "sm_89": "sm_89",
    "sm_90": "sm_90",
    "sm_100": "sm_100f",
    "sm_120": "sm_120f",
}
"""A target of tools/gpu_model.py -> what nvcc calls the machine code in the library for it."""

_SECTION = re.compile(r"^\.text\.([\w$]+):", re.MULTILINE)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-DMMFAST_CUDA", "-Werror", "all-warnings", f"-I{CSRC}")


class CompileError(RuntimeError):
    """What nvcc said."""


class Kernel(NamedTuple):
    """One kernel of a cubin; `name` as in C++, with its template arguments."""

    name: str
    program: Program
    usage: sass.Usage


def sources() -> list[Path]:
    """Every source that nvcc compiles."""
    return sorted((CSRC / "cuda").glob("*.cu"))


@functools.lru_cache(maxsize=1)
def nvcc() -> str:
    """The compiler that the library is built with. Raises RuntimeError where there is none."""
    return cuda_build.find_nvcc()


def version() -> str:
    """Of nvcc: "13.0"."""
    found = re.search(r"release ([\d.]+)", _run(nvcc(), "--version"))
    return found[1] if found else "of unknown version"


def compile_source(source: Path, target: str, *flags: str) -> bytes:
    """The cubin of a source for a target. A warning is a CompileError with nvcc's messages."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = [nvcc(), "-cubin", f"-arch={TARGETS[target]}", *FLAGS, *flags]
        command += ["-o", str(cubin), str(source)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise CompileError(f"{source.name} for {target}:\n{done.stderr or done.stdout}")
        return cubin.read_bytes()


def extract(built: Path, target: str) -> list[bytes]:
    """The cubins for a target in an object that has been built already."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvidia.cuobjdump.path, "-xelf", f".{target}", str(built.absolute())]
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
        return [file.read_bytes() for file in sorted(Path(folder).iterdir())]


def read(cubin: bytes) -> list[Kernel]:
    """The kernels of a cubin, by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run(nvidia.nvdisasm.path, "-c", file.name)
        usage = _run(nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    taken = {
        name: sass.Usage(int(registers), int(stack) + int(local))
        for name, registers, stack, local in _USAGE.findall(usage)
    }
    parts = _SECTION.split(text)
    code = dict(zip(parts[1::2], parts[2::2]))
    mangled = sorted(taken.keys() & code.keys())
    names = _run("c++filt", *mangled).splitlines() if mangled else []
    kernels = [
        Kernel(short(name), sass.parse(code[symbol]), taken[symbol])
        for symbol, name in zip(mangled, names)
    ]
    return sorted(kernels, key=lambda one: one.name)


def short(name: str) -> str:
    """`void mmfast::f<mmfast::F<mmfast::bf16, 64> >(mmfast::Args)` -> `f<F<bf16,64>>`.

    Without the arguments, the namespace, and casts of template arguments.
    """
    name = name.removeprefix("void ").replace("mmfast::", "").replace("(anonymous namespace)::", "")
    name = re.sub(r"\((?:bool|int|unsigned int)\)|\s", "", name)
    depth = 0
    for place, sign in enumerate(name):
        depth += (sign == "<") - (sign == ">")
        if sign == "(" and depth == 0:
            return name[:place]
    return name


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
