"""Mutation test of the CPU kernels: `python tests/mutation.py --op glu --count 40 [--seed 0]`.

Small faults are planted one at a time in the kernel headers (`<` for `<=`, `+` for `-`, a dropped
`+ 1`, `&&` for `||` ...), the generic instruction set is compiled with the fault, and the tests of
the cases and of reliability run against it. A mutant that no test notices has survived: the test
is missing, or the fault changes speed only. The figures go into docs/reliability.md.

Needs a finished `make build`, whose other object files are linked.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from overlay import make_overlay  # noqa: E402

BUILD = ROOT / "build" / "native-emulated-amx"
# Op -> the headers that make up its kernels, and the tests that are to notice. Headers that ops
# share stand with one of them.
OPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cross_attention": (
        (*(f"cross_attention_{x}" for x in ("fwd", "few", "bwd", "bwd_gate", "bwd_dbias", "probs")),
         "scores"),
        ("tests/test_cross_attention.py", "tests/test_reliability.py"),
    ),
    "glu": (("glu_kernels", "activations"), ("tests/test_gates.py",)),
    "gated_residual": (
        ("gated_residual_rows", "gated_residual_sums", "spans"), ("tests/test_gates.py",),
    ),
    "fuse": (
        ("fuse_rows", "fuse_weights", "fuse_fwd", "fuse_bwd", "fuse_math"),
        ("tests/test_gates.py",),
    ),
    "modulate": (
        ("modulate_fwd", "modulate_bwd", "modulate_columns", "row_norm"), ("tests/test_gates.py",),
    ),
    "adaptation_gate": (("adaptation_gate_kernels",), ("tests/test_gates.py",)),
}  # fmt: skip
SWAPS = [
    (" < ", " <= "),
    (" <= ", " < "),
    (" > ", " >= "),
    (" >= ", " > "),
    (" == ", " != "),
    (" != ", " == "),
    (" && ", " || "),
    (" || ", " && "),
    (" + 1", ""),
    (" - 1", ""),
    (" += ", " -= "),
    (" - ", " + "),
    (" * ", " + "),
    ("min64(", "max64("),
    ("max64(", "min64("),
    ("true", "false"),
    ("false", "true"),
]
# Lines that declare rather than compute: a fault there does not compile.
SKIPPED = re.compile(r"^\s*(#|//|template|static_assert|constexpr|using|struct|extern|require)")


class Mutant(NamedTuple):
    path: str
    line: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line + 1}: {self.old} -> {self.new}"


def mutants(headers: tuple[str, ...]) -> list[Mutant]:
    found = []
    for path in (f"csrc/cpu/{name}.h" for name in headers):
        conditions: list[str] = []  # of the preprocessor, around this line
        for number, line in enumerate((ROOT / path).read_text().splitlines()):
            if line.startswith("#if"):
                conditions.append(line)
            elif line.startswith("#else"):
                conditions[-1] = "#else"
            elif line.startswith("#endif"):
                conditions.pop()
            if any("__AVX" in condition for condition in conditions):
                continue  # not in the generic build
            code = line.split("//")[0].rstrip()
            if not code or SKIPPED.match(code):
                continue
            for old, new in SWAPS:
                for match in re.finditer(re.escape(old), code):
                    start, end = match.span()
                    found.append(Mutant(path, number, code, code[:start] + new + code[end:]))
    return found


def command(rule: str) -> list[str]:
    """The flags of a build.ninja target whose name ends in `rule`."""
    text = (BUILD / "build.ninja").read_text()
    block = text[text.index(f"{rule}:") :]
    return re.search(r"flags = (.*)", block)[1].split()  # type: ignore[index]


def build(op: str, tree: Path, objects: Path) -> Path | None:
    """The library with the generic kernels of `tree`; None when they do not compile."""
    flags = [flag.replace(str(ROOT / "csrc"), str(tree / "csrc")) for flag in command("generic.o")]
    target = objects / f"{op}_generic.o"
    source = tree / f"csrc/cpu/{op}_generic.cpp"
    compile_ = ["c++", *flags, "-O1", "-w", "-c", str(source), "-o", str(target)]
    if subprocess.run(compile_, capture_output=True, check=False).returncode != 0:
        return None
    library = objects / "_C.so"
    linked = sorted(str(path) for path in objects.glob("*.o"))
    subprocess.run(["c++", *linked, "-o", str(library), *command("mmfast/_C.so")], check=True)
    return library


def survives(op: str, package: Path) -> bool:
    only = "cpu-generic" if op == "cross_attention" else f"cpu-generic and {op}"
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    # Not `python -m pytest`, which puts this checkout before the package with the fault.
    pytest = [str(Path(sys.executable).with_name("pytest")), "-x", "-q", "-p", "no:cacheprovider"]
    try:
        process = subprocess.run(
            [*pytest, *OPS[op][1], "-k", only],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            timeout=400,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return process.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, default="cross_attention")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--match", default="", help="only mutants whose description holds this")
    options = parser.parse_args()
    op = options.op
    chosen = [mutant for mutant in mutants(OPS[op][0]) if options.match in str(mutant)]
    total = len(chosen)
    random.Random(options.seed).shuffle(chosen)

    with tempfile.TemporaryDirectory() as folder:
        tree, objects = Path(folder, "tree"), Path(folder, "objects")
        shutil.copytree(ROOT / "csrc", tree / "csrc")
        objects.mkdir()
        for path in (BUILD / "obj").rglob("*.o"):
            if path.name != "pyb.o":
                shutil.copy(path, objects)
        library = build(op, tree, objects)
        assert library is not None, "the kernels as they are do not compile"
        package = make_overlay(Path(folder, "package"), library)
        assert survives(op, package), "the tests fail without any fault"

        judged, survivors = 0, []
        for mutant in chosen:
            if judged == options.count:
                break
            file = tree / mutant.path
            original = file.read_text()
            lines = original.splitlines()
            lines[mutant.line] = mutant.new
            file.write_text("\n".join(lines) + "\n")
            if build(op, tree, objects) is not None:
                judged += 1
                alive = survives(op, package)
                survivors += [mutant] if alive else []
                print(f"{'SURVIVED' if alive else 'killed'} {mutant}", flush=True)
            file.write_text(original)
    print(f"\n{judged - len(survivors)} of {judged} mutants killed (of {total} possible)")


if __name__ == "__main__":
    main()
