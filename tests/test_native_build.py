"""Which files of csrc/ are compiled, and with which flags, by their names alone."""

from __future__ import annotations

from pathlib import Path

import native_build
import pytest

NAMES = ("x_generic", "x_avx2", "x_avx512", "x_avx512_bf16", "x_amx", "x_amx_emulated", "isa")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("cpu", "bindings", "common"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    for name in NAMES:
        (tmp_path / "csrc" / "cpu" / f"{name}.cpp").touch()
    (tmp_path / "csrc" / "bindings" / "ops.cpp").touch()
    (tmp_path / "csrc" / "bindings" / "pyb.cpp").touch()
    monkeypatch.setattr(native_build, "ROOT", tmp_path)
    return tmp_path


def planned(emulate_amx: bool) -> dict[str, str]:
    found = native_build.sources_and_flags(emulate_amx)
    return {path.stem: " ".join(flags) for path, flags in found}


@pytest.mark.skipif(not native_build.X86, reason="instruction sets of x86")
def test_the_suffix_gives_the_flags(tree: Path) -> None:
    plan = planned(emulate_amx=True)
    assert set(plan) == {*NAMES, "ops"}
    assert "-mavx" not in plan["x_generic"] + plan["isa"] + plan["ops"]
    assert "-mavx2" in plan["x_avx2"]
    assert "-mavx512" not in plan["x_avx2"]
    assert "-mavx512f" in plan["x_avx512"]
    assert "-mavx512bf16" not in plan["x_avx512"]
    assert "-mavx512bf16" in plan["x_avx512_bf16"]
    assert "-mamx" not in plan["x_avx512_bf16"] + plan["x_amx_emulated"]
    assert "-mamx-bf16" in plan["x_amx"]
    assert all("-march=x86-64-v2" in flags for flags in plan.values())
    assert "-std=c++20" in plan["ops"]
    assert all("-std=c++17" in flags for name, flags in plan.items() if name != "ops")


def test_emulated_tiles_are_for_development_builds_only(tree: Path) -> None:
    assert "x_amx_emulated" not in planned(emulate_amx=False)


def test_elsewhere_only_generic_code_is_compiled(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build, "X86", False)
    monkeypatch.setattr(native_build, "BASELINE", ())
    plan = planned(emulate_amx=True)
    assert set(plan) == {"x_generic", "isa", "ops"}
    assert not any("-m" in flags for flags in plan.values())


def test_never_fast_math() -> None:
    assert "-ffast-math" not in native_build.COMMON_FLAGS
    assert not any("-ffast-math" in flags for _, flags in native_build.SUFFIX_FLAGS)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("sources", "csrc/cpu has no sources"),
        ("compiler", "CXX=no-such-compiler names no program; install g"),
        ("torch", "torch not found; install torch first"),
    ],
)
def test_what_is_missing_is_one_sentence(
    tree: Path, monkeypatch: pytest.MonkeyPatch, missing: str, message: str
) -> None:
    if missing == "sources":
        for path in (tree / "csrc" / "cpu").iterdir():
            path.unlink()
    elif missing == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:
        find = native_build.importlib.util.find_spec
        monkeypatch.setattr(
            native_build.importlib.util, "find_spec", lambda n: None if n == "torch" else find(n)
        )
    with pytest.raises(native_build.MissingToolError, match=message) as caught:
        native_build.find_toolchain()
    assert "\n" not in str(caught.value)


def test_an_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\n")

    class Spec:
        submodule_search_locations = (str(tmp_path / "torch"),)

    monkeypatch.setattr(native_build.importlib.util, "find_spec", lambda name: Spec())
    with pytest.raises(native_build.MissingToolError, match=r"torch 2\.9\.1\+cpu is too old"):
        native_build.find_torch()
