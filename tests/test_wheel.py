"""The released wheel: what is inside, which GPU code, and that it runs where it is installed.

`slow` builds it with `make wheel`, which compiles what is not compiled yet and sets up an
environment of its own, and installs it beside other versions of torch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import cuda_build
import native_build
import pytest
import wheel_check
import wheel_release as wheel_tool
import wheel_sysroot
from test_packaging import make_sdist, metadata, package_files, tree_files, unpack

from mmfast import __version__

ROOT = Path(__file__).resolve().parent.parent
ARCHS = {"elf": {80, 86, 89, 90, 100, 120}, "ptx": {80, 120}}
EPOCH = 1_700_000_000


def clean_environment(**more: str) -> dict[str, str]:
    drop = ("MMFAST_", "MAKE", "MFLAGS", "PYTHON", "SOURCE_DATE_EPOCH")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(drop)}, **more}


@pytest.fixture(scope="session", params=["on", "off"], ids=["cuda", "cpu"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make wheel` fills; its name says with or without CUDA kernels."""
    if request.param == "on":
        try:
            cuda_build.toolkit_of(cuda_build.find_nvcc())
        except RuntimeError as missing:
            pytest.skip(f"no CUDA wheel: {missing}")
    folder = tmp_path_factory.mktemp("release") / request.param
    done = subprocess.run(
        ["make", "wheel", f"CUDA={request.param}", f"ARGS=--output {folder}"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def wheel_of(release: Path) -> Path:
    (found,) = release.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_is_the_tree_and_the_library(release: Path) -> None:
    wheel = wheel_of(release)
    machine = wheel_tool.platform.machine()
    assert wheel.name == f"mmfast-{__version__}-py3-none-manylinux_2_28_{machine}.whl"
    assert package_files(wheel) == tree_files() | {"mmfast/_C.so"}
    assert wheel.stat().st_size < 60_000_000
    assert f"Tag: py3-none-manylinux_2_28_{machine}" in metadata(wheel, "WHEEL")
    with zipfile.ZipFile(wheel) as archive:
        for line in metadata(wheel, "RECORD").splitlines():
            name, digest, _ = line.split(",")
            if digest:
                got = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest())
                assert digest == f"sha256={got.decode().rstrip('=')}", name


@pytest.mark.slow
def test_the_library_needs_torch_and_glibc_2_28(release: Path, tmp_path: Path) -> None:
    library = wheel_check.wheel_library(wheel_of(release), tmp_path)
    dynamic = subprocess.run(
        ["readelf", "-dW", "--dyn-syms", "--version-info", str(library)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    system = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
    system |= {"libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert needed - system == {"libtorch.so", "libtorch_cpu.so"}
    glibc = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", dynamic)}
    assert max(glibc) <= (2, 28)
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    rows = [line.split() for line in dynamic.splitlines()]
    exported = {r[7] for r in rows if len(r) == 8 and r[4] in ("GLOBAL", "WEAK") and r[6] != "UND"}
    assert exported and all(name.startswith("mmfast_") for name in exported - {"Name"}), exported
    assert str(ROOT).encode() not in library.read_bytes()


@pytest.mark.slow
def test_the_gpu_code_is_for_the_architectures_promised(release: Path, tmp_path: Path) -> None:
    """Read from the file by ourselves, and by NVIDIA's cuobjdump where there is one."""
    library = wheel_check.wheel_library(wheel_of(release), tmp_path)
    want = ARCHS if release.name == "on" else {"elf": set(), "ptx": set()}
    assert wheel_check.embedded_code(library) == want
    if release.name == "off":
        return
    triton = pytest.importorskip("triton", reason="its wheel has a cuobjdump")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kind, option in (("elf", "--list-elf"), ("ptx", "--list-ptx")):
        listed = subprocess.run(
            [str(cuobjdump), option, str(library)], check=True, capture_output=True, text=True
        ).stdout
        files = [line for line in listed.splitlines() if "file" in line]
        assert {int(n) for n in re.findall(r"\bsm_(\d+)", listed)} == want[kind]
        each = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
        assert len(files) % len(want[kind]) == 0 and len(files) <= each * len(want[kind])


@pytest.mark.slow
def test_sums_and_the_bill_of_materials(release: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=release, check=True)
    wheel = wheel_of(release)
    listed = {line.split()[1] for line in (release / "SHA256SUMS").read_text().splitlines()}
    sbom_name = f"{wheel.name}.cdx.json"
    assert listed == {wheel.name, f"mmfast-{__version__}.tar.gz", sbom_name}
    sbom = json.loads((release / sbom_name).read_text())
    own = sbom["metadata"]["component"]
    assert (own["name"], own["version"]) == ("mmfast", __version__)
    assert own["hashes"] == [
        {"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()}
    ]
    inside = {component["name"] for component in sbom["components"]}
    assert inside == {"torch"} | ({"cudart_static"} if release.name == "on" else set())
    tools = {tool["name"] for tool in sbom["metadata"]["tools"]["components"]}
    assert ("nvcc" in tools) == (release.name == "on")


@pytest.mark.slow
def test_again_gives_the_same_bytes(release: Path, tmp_path: Path) -> None:
    before = (release / "SHA256SUMS").read_text()
    again = subprocess.run(
        ["make", "wheel", f"CUDA={release.name}", f"ARGS=--output {tmp_path / 'again'}"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr[-4000:]
    assert (tmp_path / "again" / "SHA256SUMS").read_text() == before
    folder = ("make", "wheel-same", f"CUDA={release.name}", f"AS={release}")
    same = subprocess.run(
        [*folder, f"DIST={tmp_path / 'again'}"], cwd=ROOT, env=clean_environment(), check=False
    )
    assert same.returncode == 0


@pytest.mark.slow
def test_another_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    """The whole processor part compiled anew elsewhere: no path gets into the wheel."""
    python = ROOT / ".venv-wheel" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment of `make wheel`")
    tree = unpack(make_sdist(tmp_path), tmp_path / "unpacked")
    environment = clean_environment(SOURCE_DATE_EPOCH=str(EPOCH))
    sums = []
    for root in (ROOT, tree):
        output = tmp_path / f"of-{root.name}"
        command = [str(python), "tools/wheel_release.py", "--cuda", "off", "--output", str(output)]
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        sums.append(hashlib.sha256(wheel_of(output).read_bytes()).hexdigest())
    assert sums[0] == sums[1]


@pytest.mark.slow
@pytest.mark.parametrize("torch", ["2.13.0", "2.14.1"])
def test_it_runs_where_it_is_installed(release: Path, tmp_path: Path, torch: str) -> None:
    """One binary: under a CPU build of torch and a CUDA build, on a machine without a GPU."""
    told = wheel_check.try_wheel(wheel_of(release), tmp_path / "venv", sys.executable, torch)
    assert told["torch"].startswith(torch)
    assert told["build"]["version"] == __version__
    assert told["build"]["amx_emulated"] is False
    assert len(told["ops"]) == 6
    with_cuda = release.name == "on"
    archs = "80,86,89,90,100f,120f" if with_cuda else ""
    assert told["build"]["cuda_archs"] == archs
    assert told["build"]["cuda_ptx"] == ("80,120" if with_cuda else "")
    library = told["info"]["Compiled library"]
    held = f"machine code for {archs}, PTX for 80,120, of CUDA " if with_cuda else "none; "
    assert library["CUDA kernels"].startswith(held)
    is_cuda_torch = told["info"]["Versions"]["CUDA of torch"][0].isdigit()
    if with_cuda and not is_cuda_torch:
        assert "no: this torch is a CPU build" in library["CUDA kernels in use"]
    elif with_cuda:
        assert told["streams"], "torch's streams are not found"
        assert "CUDA kernels in use" in library
    assert told["info"]["Backends"]["cross_attention on cuda"] != "available"


def test_repacking_forgets_times_order_and_rights(tmp_path: Path) -> None:
    made = []
    for number, order in enumerate((("a.py", "m/_C.so"), ("m/_C.so", "a.py"))):
        old, new = tmp_path / f"old{number}.whl", tmp_path / f"new{number}.whl"
        with zipfile.ZipFile(old, "w") as archive:
            archive.writestr("m.dist-info/RECORD", "")
            for name in order:
                entry = zipfile.ZipInfo(name, (2000 + number, 1, 1, 0, 0, 0))
                entry.external_attr = (0o600 + number) << 16
                archive.writestr(entry, name)
        wheel_tool.repack_wheel(old, new, EPOCH)
        made.append(new.read_bytes())
    assert made[0] == made[1]
    with zipfile.ZipFile(tmp_path / "new0.whl") as archive:
        assert archive.namelist() == ["a.py", "m/_C.so", "m.dist-info/RECORD"]
        entry = archive.getinfo("m/_C.so")
        assert entry.external_attr >> 16 == 0o100755
        assert entry.date_time[:3] == time.gmtime(EPOCH)[:3]


def test_repacking_an_sdist(tmp_path: Path) -> None:
    made = []
    for number in range(2):
        source = tmp_path / f"tree{number}"
        (source / "m").mkdir(parents=True)
        for name in ("b.sh", "a.py"):
            (source / "m" / name).write_text(name, encoding="utf-8")
        (source / "m" / "b.sh").chmod(0o744)
        os.utime(source / "m" / "a.py", (number, number))
        with tarfile.open(tmp_path / f"{number}.tar.gz", "w:gz") as archive:
            archive.add(source / "m", "m")
        new = tmp_path / f"new{number}.tar.gz"
        wheel_tool.repack_sdist(tmp_path / f"{number}.tar.gz", new, EPOCH)
        made.append(new.read_bytes())
    assert made[0] == made[1]
    with tarfile.open(tmp_path / "new0.tar.gz") as archive:
        found = {entry.name: (entry.mode, entry.mtime, entry.uid) for entry in archive}
    assert found == {
        "m": (0o755, EPOCH, 0),
        "m/a.py": (0o644, EPOCH, 0),
        "m/b.sh": (0o755, EPOCH, 0),
    }


def test_the_time_of_a_release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "12345")
    assert wheel_tool.source_date() == 12345
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    (tmp_path / "pyproject.toml").touch()
    os.utime(tmp_path / "pyproject.toml", (EPOCH, EPOCH))
    monkeypatch.setattr(wheel_tool, "ROOT", tmp_path)
    assert wheel_tool.source_date() == EPOCH, "an sdist has no commit"


def test_without_nvcc_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MMFAST_NVCC", "/no/nvcc")
    monkeypatch.delenv("MMFAST_CUDA", raising=False)
    monkeypatch.setattr(sys, "argv", ["wheel_release.py"])
    assert wheel_tool.main() == 1
    told = capsys.readouterr().err
    assert told.startswith("mmfast: MMFAST_CUDA=on, but MMFAST_NVCC=/no/nvcc names no program; ")
    assert told.endswith("; without CUDA kernels: make wheel CUDA=off\n") and told.count("\n") == 1


def test_without_ziglang_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_sysroot.sys, "executable", "/bin/false")
    with pytest.raises(wheel_sysroot.StubError, match=r"no stubs of glibc 2\.28: .*pip install"):
        wheel_sysroot.make_sysroot(tmp_path / "sysroot")
    assert not (tmp_path / "sysroot").exists()


def test_the_headers_keep_to_gcc_8(tmp_path: Path) -> None:
    """Without them, the same code asks for a std::stringstream of GCC 9 and 11."""
    try:
        compiler = native_build.shlex.split(native_build.find_compiler())
    except native_build.MissingToolError as missing:
        pytest.skip(str(missing))
    (tmp_path / "sys").mkdir()
    for name, text in wheel_sysroot.HEADERS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    code = """
#include <memory>
#include <sstream>
#include <vector>
std::string text(std::shared_ptr<int> p, size_t n) {
  std::ostringstream s;
  s << *p << std::vector<int>(n).size() << 1.5;
  return s.str();
}
"""
    (tmp_path / "x.cpp").write_text(code, encoding="utf-8")
    undefined = {}
    for which, flags in {"plain": [], "older": ["-I", ".", "-include", "older.h"]}.items():
        command = [*compiler, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", *flags]
        subprocess.run([*command, "-c", "x.cpp", "-o", f"{which}.o"], cwd=tmp_path, check=True)
        listed = subprocess.run(
            ["nm", "-u", f"{which}.o"], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout
        undefined[which] = set(listed.split()) - {"U", "w"}
    newer = {name for name in undefined["plain"] if "stringstreamI" in name or "stringbufI" in name}
    assert newer
    assert not any("stringstreamI" in name for name in undefined["older"])
    for name in ("__libc_single_threaded", "_ZSt28__throw_bad_array_new_lengthv"):
        assert name not in undefined["older"]
    # Facets stay libstdc++'s own: one of ours would be unknown to its locales.
    assert not any("2idE" in name and "V" in name for name in undefined["older"])
    defined = subprocess.run(
        ["nm", "--defined-only", "older.o"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert not re.search(r"(num_put|numpunct).*2idE", defined)


def fat_binary(*entries: tuple[int, int]) -> bytes:
    """As nvcc lays it out: (kind, architecture) of each entry, with a payload of 24 bytes."""
    body = b""
    for kind, arch in entries:
        header = wheel_check.struct.pack("<HHIQ", kind, 0x101, 64, 24).ljust(28, b"\0")
        body += (header + wheel_check.struct.pack("<I", arch)).ljust(64, b"\0") + b"x" * 24
    return wheel_check.FAT_BINARY + wheel_check.struct.pack("<HHQ", 1, 16, len(body)) + body


def test_gpu_code_is_found_in_a_file(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(
        b"ELF..." + fat_binary((2, 80), (1, 80)) + b"...." + fat_binary((2, 120), (2, 90)) + b"end"
    )
    assert wheel_check.embedded_code(library) == {"elf": {80, 90, 120}, "ptx": {80}}
    library.write_bytes(b"ELF" + fat_binary((2, 80))[:40] + b"..")
    assert wheel_check.embedded_code(library) == {"elf": set(), "ptx": set()}


def test_no_wheel_is_a_sentence() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "wheel_check.py"), "/no/mmfast.whl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "mmfast: there is no /no/mmfast.whl; `make wheel` makes it\n"


def test_a_wheel_that_cannot_be_installed_says_so(tmp_path: Path) -> None:
    with pytest.raises(wheel_check.CheckError, match="/no/python -m venv"):
        wheel_check.make_environment(tmp_path / "venv", "/no/python", [])


def makefile_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", text, re.M))


@pytest.mark.parametrize("name", ["ci", "release"])
def test_workflows_only_call_make(name: str) -> None:
    """What a server does can be done on any machine."""
    path = ROOT / ".github" / "workflows" / f"{name}.yml"
    if not path.exists():
        pytest.skip("an sdist has no workflows")
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    commands = [s["run"] for job in jobs.values() for s in job["steps"] if "run" in s]
    assert commands
    for command in commands:
        words = command.split()
        assert words[0] == "make" and words[1] in makefile_targets(), command
    if name == "release":
        tried = jobs["try"]["strategy"]["matrix"]
        assert set(tried["machine"]) == {"x86_64", "aarch64"}
        classifiers = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert tried["python"] == re.findall(r"Python :: (3\.\d+)", classifiers)
