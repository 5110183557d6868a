"""No file compiled for a newer processor may offer the linker code that others would then run.

A template or inline function compiled with -mavx512f is a weak symbol: of several copies the
linker keeps any one, and an AVX2 machine would meet AVX-512 instructions in std::vector. So an
object of an instruction set defines nothing outside the namespace mmfast, and nothing weak that
another object defines too.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import native_build
import pytest

from mmfast import _library

BUILD = Path(__file__).resolve().parent.parent / "build"


class Symbol(NamedTuple):
    kind: str
    name: str

    @property
    def weak(self) -> bool:
        return self.kind in "WVu"


def defined_symbols(path: Path) -> list[Symbol]:
    """The global and weak definitions of an object file, demangled."""
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", "--extern-only", str(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    rows = (line.split(maxsplit=2) for line in listing.splitlines() if line.strip())
    return [Symbol(row[1], row[2]) for row in rows if len(row) == 3]


def is_isa_object(path: Path) -> bool:
    name = path.with_suffix(".cpp").name
    return any(name.endswith(suffix) for suffix, _ in native_build.SUFFIX_FLAGS)


def leaks(objects: Iterable[Path]) -> list[str]:
    """What the instruction-set objects define that the linker could choose for everyone."""
    tables = {path: defined_symbols(path) for path in objects}
    found = []
    for path, symbols in tables.items():
        if not is_isa_object(path):
            continue
        others = {
            symbol.name for other, table in tables.items() if other != path for symbol in table
        }
        for symbol in symbols:
            own = "mmfast::" in symbol.name.partition("(")[0] or symbol.name.startswith("mmfast_")
            if not own:
                found.append(f"{path.name} defines {symbol.name}, which is not mmfast's")
            elif symbol.weak and symbol.name in others:
                found.append(f"{path.name} defines {symbol.name}, and so does another object")
    return found


def newest_objects() -> list[Path]:
    """The objects of csrc/ of the build that was made last."""
    builds = [path for path in BUILD.glob("native*") if (path / "obj" / "csrc" / "cpu").is_dir()]
    builds = [path for path in builds if not path.name.endswith(tuple(native_build.SANITIZERS))]
    if not builds:
        return []
    newest = max(builds, key=lambda path: (path / ".ninja_log").stat().st_mtime)
    objects = sorted((newest / "obj" / "csrc").rglob("*.o"))
    compiled = {path.stem for path, _ in native_build.sources_and_flags(emulate_amx=True)}
    return [path for path in objects if path.stem in compiled]


def test_isa_objects_offer_nothing_to_others() -> None:
    objects = newest_objects()
    if not objects:
        pytest.skip(f"no object files: {_library.status().reason or 'not built in this tree'}")
    if native_build.X86:
        assert any(is_isa_object(path) for path in objects)
    assert leaks(objects) == []


def test_library_shows_only_its_entry_points() -> None:
    path = _library.status().path
    if path is None or not _library.status().loaded:
        pytest.skip(f"no compiled library: {_library.status().reason}")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", path], check=True, capture_output=True, text=True
    ).stdout
    # V and W: typeinfo of std that g++ always exports; baseline code, so any copy will do.
    shown = {line.split()[-1] for line in listing.splitlines() if line.split()[-2] not in "VWu"}
    from_the_linker = {"_end", "_edata", "__bss_start"}
    assert shown - from_the_linker == set(_library._ENTRY_POINTS)


PLANTED = {
    "vector_avx512.cpp": (
        "#include <vector>\n"
        "namespace mmfast { float f(int n) { std::vector<float> v(n, 1.f); v.resize(2 * n);"
        " return v.back(); } }"
    ),
    "inline_avx2.cpp": (
        "namespace mmfast { inline __attribute__((noinline)) float g(float x) { return x * x; }"
        " float a(float x) { return g(x); } }"
    ),
    "inline_generic.cpp": (
        "namespace mmfast { inline __attribute__((noinline)) float g(float x) { return x * x; }"
        " float b(float x) { return g(x); } }"
    ),
}


@pytest.mark.skipif(not native_build.X86, reason="instruction sets of x86")
def test_planted_leaks_are_found(tmp_path: Path) -> None:
    try:
        compiler = native_build.find_compiler().split()
    except native_build.MissingToolError as missing:
        pytest.skip(str(missing))
    objects = []
    for name, code in PLANTED.items():
        source = tmp_path / name
        source.write_text(code, encoding="utf-8")
        target = source.with_suffix(".o")
        flags = native_build.kernel_flags(name)
        assert flags is not None
        subprocess.run([*compiler, "-O2", *flags, "-c", source, "-o", target], check=True)
        objects.append(target)
    found = leaks(objects)
    assert any("vector_avx512.o" in line and "not mmfast's" in line for line in found), found
    assert any("inline_avx2.o defines mmfast::g(float)" in line for line in found), found
    assert not any("inline_generic.o" in line for line in found), found
