"""The wheel holds exactly the tree, and the sdist holds what builds it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import native_build
import pytest
from fresh_process import run_python

from mmfast import __version__

ROOT = Path(__file__).resolve().parent.parent


def setup_py(tree: Path, *arguments: str, **environment: str) -> None:
    """`python setup.py ...` in a process of its own; a failure shows its output."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MMFAST_")}
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=tree,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(tree: Path, folder: Path, **environment: str) -> Path:
    """A wheel of `tree` in `folder`, with the intermediate files there as well."""
    folder.mkdir(exist_ok=True)
    config = folder / "setup.cfg"  # --build-base of a command that must not have run already
    config.write_text(f"[build]\nbuild_base = {folder / 'build'}\n", encoding="utf-8")
    environment = {"DIST_EXTRA_CONFIG": str(config), **environment}
    options = ["egg_info", "--egg-base", str(folder)]
    options += ["bdist_wheel", "--dist-dir", str(folder), "--bdist-dir", str(folder / "bdist")]
    setup_py(tree, *options, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def package_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def tree_files() -> set[str]:
    """What a wheel without the library has to hold: mmfast/, and kernels/ as mmfast/kernels/."""
    found = set()
    for top, prefix in (("mmfast", "mmfast"), ("kernels", "mmfast/kernels")):
        for path in (ROOT / top).rglob("*"):
            if path.suffix == ".py" or path.name in ("py.typed", "fingerprints.json"):
                found.add(f"{prefix}/{path.relative_to(ROOT / top).as_posix()}")
    return found


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
        return archive.read(member).decode()


def test_wheel_without_library_is_the_tree(tmp_path: Path) -> None:
    (tmp_path / "build" / "lib" / "mmfast").mkdir(parents=True)
    (tmp_path / "build" / "lib" / "mmfast" / "deleted_long_ago.py").touch()
    wheel = build_wheel(ROOT, tmp_path, MMFAST_BUILD="off")
    assert wheel.name == f"mmfast-{__version__}-py3-none-any.whl"
    assert package_files(wheel) == tree_files()
    assert "Root-Is-Purelib: true" in metadata(wheel, "WHEEL")
    told = metadata(wheel, "METADATA")
    assert f"\nVersion: {__version__}\n" in told
    assert re.search(r"^License-Expression: Apache-2\.0$", told, re.M)
    required = re.findall(r"^Requires-Dist: (\S+)$", told, re.M)
    assert required == ["torch>=2.10"], "everything else is an extra"


def test_wheel_runs_where_it_is_installed(tmp_path: Path) -> None:
    """Also the guard that no module needs a file that the wheel lacks."""
    wheel = build_wheel(ROOT, tmp_path, MMFAST_BUILD="off")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # noqa: S202  (made above)
    code = (
        "import torch, mmfast, mmfast.nn, mmfast.kernels;"
        "q = torch.randn(1, 2, 3, 8);"
        "print(mmfast.cross_attention(q, q, q).shape, mmfast.__file__)"
    )
    done = run_python("-c", code, package=site)
    assert done.returncode == 0, done.stderr
    assert "[1, 2, 3, 8]" in done.stdout
    assert str(site) in done.stdout


def test_wheel_with_library(tmp_path: Path) -> None:
    """Reuses the objects of `make build`; compiling anew is in the slow test below."""
    if not (ROOT / "build" / "native-emulated-amx" / "obj" / "csrc" / "bindings").is_dir():
        pytest.skip("no objects of `make build` to link")
    wheel = build_wheel(ROOT, tmp_path, MMFAST_BUILD="on", MMFAST_EMULATE_AMX="1")
    assert re.fullmatch(rf"mmfast-{re.escape(__version__)}-py3-none-linux_\w+\.whl", wheel.name)
    assert package_files(wheel) == tree_files() | {"mmfast/_C.so"}
    assert "Root-Is-Purelib: false" in metadata(wheel, "WHEEL")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # noqa: S202  (made above)
    dynamic = subprocess.run(
        ["readelf", "-d", str(site / "mmfast" / "_C.so")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    assert not any("python" in name or "gomp" in name or "omp5" in name for name in needed)
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


def make_sdist(folder: Path) -> Path:
    setup_py(ROOT, "egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder))
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)  # noqa: S202  (made above)
    (tree,) = [path for path in folder.iterdir() if path.name.startswith("mmfast-")]
    return tree


def test_sdist_holds_the_sources_and_builds(tmp_path: Path) -> None:
    sdist = make_sdist(tmp_path)
    tree = unpack(sdist, tmp_path / "unpacked")
    for top in ("csrc", "kernels", "mmfast", "tests", "benchmarks", "examples", "tools"):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and "results" not in path.parts:
                assert (tree / path.relative_to(ROOT)).exists(), path
    for name in ("LICENSE", "README.md", "Makefile", "requirements-wheel.txt", "pyproject.toml"):
        assert (tree / name).exists(), name
    assert not list(tree.rglob("*.so"))
    assert not list(tree.glob("examples/*/data"))  # what users downloaded
    wheel = build_wheel(tree, tmp_path / "wheel", MMFAST_BUILD="off")
    assert package_files(wheel) == tree_files()


@pytest.mark.slow
def test_sdist_compiles(tmp_path: Path) -> None:
    try:
        native_build.find_toolchain()
    except native_build.MissingToolError as missing:
        pytest.skip(str(missing))
    tree = unpack(make_sdist(tmp_path), tmp_path / "unpacked")
    wheel = build_wheel(tree, tmp_path / "wheel", MMFAST_BUILD="on")
    assert "mmfast/_C.so" in package_files(wheel)


def test_without_a_compiler_one_line_and_a_wheel(tmp_path: Path) -> None:
    wheel = build_wheel(ROOT, tmp_path, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert package_files(wheel) == tree_files()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MMFAST_BUILD": "maybe"}, "mmfast: MMFAST_BUILD=maybe is not known; use auto, on or off"),
        (
            {"MMFAST_BUILD": "on", "CXX": "no-such-compiler"},
            "mmfast: MMFAST_BUILD=on, but CXX=no-such-compiler names no program; install g++",
        ),
    ],
)
def test_a_build_that_cannot_be_says_so(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        build_wheel(ROOT, tmp_path, **environment)
