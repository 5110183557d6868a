"""Importing and running with something missing or broken, each in a fresh process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import native_build
import pytest
from fresh_process import run_python
from overlay import make_overlay

LIBRARY = Path(__file__).resolve().parent.parent / "mmfast" / "_C.so"

# What a stranger would notice: the reason, whether a call still works, and what asking for the
# compiled backend by name says.
PROBE = """
import json, sys, warnings
import torch
import mmfast
loaded_by_import = any("mmfast" in path for path in torch.ops.loaded_libraries)
q, k, v = (torch.randn(2, 3, n, 16) for n in (5, 7, 7))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = mmfast.cross_attention(q, k, v)
with mmfast.use_backend("reference"):
    same = bool(torch.allclose(out, mmfast.cross_attention(q, k, v), atol=1e-5))
named = None
try:
    with mmfast.use_backend("cpu"):
        mmfast.cross_attention(q, k, v)
except (RuntimeError, ValueError) as error:
    named = str(error)
from mmfast import _library
status = _library.status()
print(json.dumps({
    "loaded_by_import": loaded_by_import, "loaded": status.loaded, "reason": status.reason,
    "same": same, "named": named, "triton": "triton" in sys.modules,
    "warnings": [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)],
}))
"""

BLOCK_TRITON = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError("triton is blocked in this test")
sys.meta_path.insert(0, Blocked())
"""


def probe(code: str = PROBE, **kwargs: Any) -> dict[str, Any]:
    done = run_python("-c", code, **kwargs)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_reference_only(got: dict[str, Any], *words: str, warned: bool = True) -> None:
    """One clear sentence, the reference backend works, and a named backend never falls back."""
    reason = got["reason"]
    assert not got["loaded"]
    assert got["same"]
    assert reason
    assert "\n" not in reason
    assert "Traceback" not in reason
    for word in words:
        assert word in reason
    assert reason in got["named"]
    assert got["warnings"] == ([f"mmfast: {reason}"] if warned else [])


def compile_library(source: str, target: Path) -> Path:
    """A shared library of our own making; skips where there is no compiler."""
    try:
        compiler = native_build.find_compiler()
    except native_build.MissingToolError as missing:
        pytest.skip(str(missing))
    code = target.with_suffix(".cpp")
    code.write_text(source, encoding="utf-8")
    subprocess.run(
        [*compiler.split(), "-shared", "-fPIC", str(code), "-o", str(target)], check=True
    )
    return target


def entry_points(version: str) -> str:
    return f"""
    extern "C" const char* mmfast_isa_available() {{ return "generic"; }}
    extern "C" const char* mmfast_isa_current() {{ return "generic"; }}
    extern "C" int mmfast_isa_set(const char*) {{ return 0; }}
    extern "C" int mmfast_cuda_streams() {{ return 0; }}
    extern "C" const char* mmfast_build_info() {{ return "{{\\"version\\": \\"{version}\\"}}"; }}
    """


def test_import_is_lazy_and_needs_no_triton() -> None:
    got = probe(BLOCK_TRITON + PROBE)
    assert not got["loaded_by_import"]
    assert not got["triton"]
    assert got["same"]


def test_import_brings_no_dynamo() -> None:
    """It would make `import mmfast` take 1.4 s longer than `import torch`."""
    code = "import torch, mmfast, sys; assert 'torch._dynamo' not in sys.modules"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_without_library(tmp_path: Path) -> None:
    got = probe(package=make_overlay(tmp_path))
    assert_reference_only(got, "not in this installation", "install a C++ compiler", warned=False)


@pytest.mark.parametrize("damage", ["text", "empty", "truncated"])
def test_corrupt_library(tmp_path: Path, damage: str) -> None:
    library = tmp_path / "broken.so"
    if damage == "truncated":
        if not LIBRARY.exists():
            pytest.skip("there is no compiled library to truncate; run `make build`")
        whole = LIBRARY.read_bytes()
        library.write_bytes(whole[: len(whole) // 2])
    else:
        library.write_bytes(b"not a library\n" * 100 if damage == "text" else b"")
    assert_reference_only(probe(package=make_overlay(tmp_path, library)), "damaged")


def test_library_of_another_torch(tmp_path: Path) -> None:
    source = 'extern "C" void torch_of_the_future(); void use() { torch_of_the_future(); }'
    library = compile_library(source, tmp_path / "future.so")
    got = probe(package=make_overlay(tmp_path, library))
    assert_reference_only(got, "does not fit torch", "torch_of_the_future", "install torch 2.10")


def test_library_of_another_version(tmp_path: Path) -> None:
    library = compile_library(entry_points("0.0.0"), tmp_path / "old.so")
    got = probe(package=make_overlay(tmp_path, library))
    assert_reference_only(got, "is of mmfast 0.0.0 but the package is")


def test_library_without_entry_points(tmp_path: Path) -> None:
    library = compile_library("int nothing;", tmp_path / "other.so")
    got = probe(package=make_overlay(tmp_path, library))
    assert_reference_only(got, "lacks mmfast_isa_available")


def test_unknown_instruction_set() -> None:
    if not LIBRARY.exists():
        pytest.skip("there is no compiled library; run `make build`")
    got = probe(environment={"MMFAST_ISA": "avx1024"})
    assert_reference_only(got, "MMFAST_ISA=avx1024", "avx512")


def test_kernels_is_not_a_top_level_package(tmp_path: Path) -> None:
    shutil.copytree(LIBRARY.parent.parent / "kernels", tmp_path / "kernels")
    # Without site-packages, where Hugging Face's package of that name may be.
    done = run_python("-S", "-c", "import kernels", package=tmp_path)
    assert done.returncode != 0
    assert "this folder is mmfast.kernels" in done.stderr


def test_kernels_gives_way_to_the_package_of_that_name(tmp_path: Path) -> None:
    """Started in a checkout, Python finds the folder first; transformers wants the package."""
    tree, site = tmp_path / "tree", tmp_path / "site"
    shutil.copytree(LIBRARY.parent.parent / "kernels", tree / "kernels")
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("from kernels.layer import name\n")
    (site / "kernels" / "layer.py").write_text("name = __name__\n")
    code = "import kernels; print(kernels.name, kernels.__file__)"
    done = run_python("-S", "-c", code, environment={"PYTHONPATH": f"{tree}{os.pathsep}{site}"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["kernels.layer", str(site / "kernels" / "__init__.py")]
