"""Installs a wheel into a fresh environment and uses it there, as a user would.

    python tools/wheel_check.py WHEEL [--python python3.12] [--torch 2.14.1]

Nothing of this checkout is in reach of the environment. It runs every CPU op forward and backward
from the library in the wheel, against the reference backend, and `python -m mmfast info`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

FAT_BINARY = struct.pack("<I", 0xBA55ED50)
PROBE = """
import json, sys, torch, mmfast
from mmfast import _library
torch.manual_seed(0)
def tensor(*shape):
    return torch.randn(*shape, requires_grad=True)
q, k, v, x, y, h, gate = (tensor(2, 3, n, 16) for n in (5, 7, 7, 5, 5, 5, 5))
lens = torch.tensor([7, 3])
calls = {
    "cross_attention": lambda: mmfast.cross_attention(q, k, v, kv_lens=lens),
    "gated_residual": lambda: mmfast.gated_residual(x, y, gate),
    "glu": lambda: mmfast.glu(x, y),
    "fuse": lambda: mmfast.fuse([x, y], torch.zeros(2), mode="softmax"),
    "modulate": lambda: mmfast.modulate(x, scale=y, shift=h),
    "adaptation_gate": lambda: mmfast.adaptation_gate(x, y),
}
def run(call, backend):
    inputs = (q, k, v, x, y, h, gate)
    with mmfast.use_backend(backend):
        out = call()
        used = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
    return [out.detach(), *(g for g in used if g is not None)]
wrong = []
for name, call in calls.items():
    got, want = run(call, "cpu"), run(call, "reference")
    if len(got) != len(want) or not all(
        torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(got, want)
    ):
        wrong.append(name)
status = _library.status()
print(json.dumps({
    "python": list(sys.version_info[:2]), "torch": torch.__version__, "file": mmfast.__file__,
    "loaded": status.loaded, "reason": status.reason, "wrong": wrong, "ops": sorted(calls),
    "isas": _library.isa_available(), "build": _library.build_info(),
    "streams": _library.has_cuda_streams(),
}))
"""


class CheckError(RuntimeError):
    """What is wrong with the wheel, or why it could not be tried."""


def run(command: list[str], what: str) -> str:
    """Standard output of a program that sees nothing of this checkout; CheckError if it fails."""
    drop = ("MMFAST_", "PYTHON", "LD_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    try:
        done = subprocess.run(
            command, cwd="/", env=kept, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise CheckError(f"{what}: {error}") from None
    if done.returncode != 0:
        raise CheckError(f"{what} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def make_environment(folder: Path, python: str, packages: list[str]) -> Path:
    """A fresh environment with `packages`; returns its Python."""
    run([python, "-m", "venv", str(folder)], f"{python} -m venv")
    inside = folder / "bin" / "python"
    install = [str(inside), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*install, *packages], f"pip install {' '.join(packages)}")
    return inside


def try_wheel(wheel: Path, folder: Path, python: str, torch: str) -> dict[str, Any]:
    """What the installed wheel says of itself, with `info` and `info_text`. Raises CheckError."""
    inside = make_environment(folder, python, [f"torch=={torch}", str(wheel.resolve())])
    told = json.loads(run([str(inside), "-c", PROBE], "using the ops").splitlines()[-1])
    if not Path(told["file"]).is_relative_to(folder.resolve()):
        raise CheckError(f"{told['file']} was imported, not what was installed")
    if not told["loaded"] or told["wrong"]:
        raise CheckError(told["reason"] or f"wrong results of {', '.join(told['wrong'])}")
    told["info"] = json.loads(run([str(inside), "-m", "mmfast", "info", "--json"], "info --json"))
    told["info_text"] = run([str(inside), "-m", "mmfast", "info"], "info")
    return told


def wheel_library(wheel: Path, folder: Path) -> Path:
    """mmfast/_C.so, unpacked into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("mmfast/_C.so", folder))


def embedded_code(library: Path) -> dict[str, set[int]]:
    """{"elf": {80, 86, ...}, "ptx": {80, 120}}: the GPU code in a library, without NVIDIA's tools.

    Each .cu leaves a "fat binary" in the section .nv_fatbin: a header (magic, version, header size,
    size of all entries), then entries (kind 1 PTX or 2 ELF, header size, payload size, ...,
    architecture at byte 28).
    """
    data = library.read_bytes()
    found: dict[str, set[int]] = {"elf": set(), "ptx": set()}
    at = data.find(FAT_BINARY)
    while at >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, at)
        entry, end = at + header, at + header + size
        if header == 16 and end <= len(data):
            while entry < end:
                kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
                (arch,) = struct.unpack_from("<I", data, entry + 28)
                if kind in (1, 2):
                    found["ptx" if kind == 1 else "elf"].add(arch)
                entry += entry_header + payload
        at = data.find(FAT_BINARY, max(entry, at + 4) if header == 16 else at + 4)
    return found


def main() -> int:
    """Command line: 0 when the wheel does what it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--torch", default="2.13.0")
    given = parser.parse_args()
    if not given.wheel.exists():
        print(f"mmfast: there is no {given.wheel}; `make wheel` makes it", file=sys.stderr)
        return 1
    python = shutil.which(given.python)
    if python is None:
        print(f"mmfast: there is no {given.python}; name another by PYTHON", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        try:
            told = try_wheel(
                given.wheel, Path(folder) / "venv", os.path.abspath(python), given.torch
            )
            code = embedded_code(wheel_library(given.wheel, Path(folder)))
        except CheckError as wrong:
            print(f"mmfast: {given.wheel.name}: {wrong}", file=sys.stderr)
            return 1
    version = ".".join(map(str, told["python"]))
    print(f"{given.wheel.name}: right in Python {version} with torch {told['torch']}")
    print(f"  CPU: {', '.join(told['isas'])}")
    print(f"  CUDA: machine code {sorted(code['elf'])}, PTX {sorted(code['ptx'])}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
