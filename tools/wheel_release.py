"""Makes what is released: wheel and sdist, checked, with check sums and a bill of materials.

    python tools/wheel_release.py [--cuda on|off] [--output dist]

Runs in the environment of requirements-wheel.txt (`make wheel` sets it up). The same commit built
by the same tools gives the same bytes: file times are SOURCE_DATE_EPOCH (default: the commit's),
names are sorted, and the library holds no path of this machine.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import io
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from email.parser import Parser
from pathlib import Path

import cuda_build
import native_build
from native_build import ROOT
from wheel_sysroot import GLIBC, StubError, make_sysroot

MOST_BYTES = 60_000_000
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_{platform.machine()}"
# torch's own libraries come with torch.
NOT_BUNDLED = ("libtorch*.so", "libc10*.so")
FIRST_ZIP_TIME = 315532800  # 1980; a zip file knows no time before


class ReleaseError(RuntimeError):
    """Why there is no release; one sentence."""


def run(*command: str, **environment: str) -> str:
    """Output of a program of this environment; its messages and a ReleaseError if it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
        raise ReleaseError(f"`{' '.join(command[:4])} ...` failed; its messages are above")
    return done.stdout


def source_date() -> int:
    """SOURCE_DATE_EPOCH, else the time of the commit, else that of pyproject.toml."""
    asked = os.environ.get("SOURCE_DATE_EPOCH", "")
    if asked.isdigit():
        return int(asked)
    done = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 0 and done.stdout.strip().isdigit():
        return int(done.stdout)
    return int((ROOT / "pyproject.toml").stat().st_mtime)


def repack_wheel(wheel: Path, target: Path, epoch: int) -> None:
    """The same files, sorted, RECORD last, with one time and plain permissions."""
    moment = time.gmtime(max(epoch, FIRST_ZIP_TIME))
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w") as new:
        files = [name for name in old.namelist() if not name.endswith("/")]
        for name in sorted(files, key=lambda n: (n.endswith("/RECORD"), n)):
            entry = zipfile.ZipInfo(name, moment[:6])
            entry.compress_type = zipfile.ZIP_DEFLATED
            mode = 0o755 if name.endswith(".so") else 0o644
            entry.external_attr = (0o100000 | mode) << 16
            new.writestr(entry, old.read(name), compresslevel=9)


def repack_sdist(sdist: Path, target: Path, epoch: int) -> None:
    """The same files, sorted, with one time, nobody's, and plain permissions."""
    packed = io.BytesIO()
    with (
        tarfile.open(sdist) as old,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for entry in sorted(old.getmembers(), key=lambda e: e.name):
            plain = tarfile.TarInfo(entry.name)
            plain.type, plain.size, plain.mtime = entry.type, entry.size, epoch
            executable = entry.isdir() or entry.mode & 0o100
            plain.mode = 0o755 if executable else 0o644
            new.addfile(plain, old.extractfile(entry) if entry.isfile() else None)
    with target.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=epoch) as zipped:
        zipped.write(packed.getvalue())


def check_library(library: Path) -> None:
    """No path of this machine inside, and torch only through its stable ABI."""
    data = library.read_bytes()
    for folder in (ROOT, Path(sys.prefix)):
        if f"{folder}/".encode() in data:
            raise ReleaseError(f"mmfast/_C.so contains the path {folder} of this machine")
    print(run("torch-abi-audit", "--check", "torch", str(library)).strip())


def check_wheel(wheel: Path) -> None:
    """The platform tag by the symbols inside (auditwheel), and the size."""
    shown = " ".join(run("auditwheel", "show", str(wheel)).split())
    print(shown)
    # Its first words are of torch's libraries, which are not inside. What counts is the symbols.
    found = re.search(r'constrains the platform tag to "manylinux_(\d+)_(\d+)_', shown)
    if found is None or (int(found[1]), int(found[2])) > tuple(map(int, GLIBC.split("."))):
        raise ReleaseError(f"{wheel.name} is not {PLATFORM}; what auditwheel says of it is above")
    size = wheel.stat().st_size
    if size > MOST_BYTES:
        raise ReleaseError(f"{wheel.name} has {size} bytes; at most {MOST_BYTES} are allowed")


def make_wheel(cuda: bool, scratch: Path, epoch: int) -> Path:
    """Builds, repairs, repacks and checks; returns the wheel in `scratch`."""
    environment = {
        "MMFAST_BUILD": "on",
        "MMFAST_CUDA": "on" if cuda else "off",
        "MMFAST_EMULATE_AMX": "0",
        "MMFAST_PYB": "0",
        "MMFAST_SYSROOT": str(make_sysroot(ROOT / "build" / "sysroot")),
        "SOURCE_DATE_EPOCH": str(epoch),
    }
    # The output of a long compile is worth seeing while it runs.
    native_build_py = [sys.executable, "tools/native_build.py", "--output", str(scratch / "lib")]
    if subprocess.run(native_build_py, cwd=ROOT, env={**os.environ, **environment}).returncode:
        raise ReleaseError("the library was not built; why is above")
    module = (sys.executable, "-m")
    options = ("--no-isolation", "--outdir", str(scratch / "raw"))
    run(*module, "build", "--wheel", *options, ".", **environment)
    (raw,) = (scratch / "raw").glob("*.whl")
    excludes = [word for name in NOT_BUNDLED for word in ("--exclude", name)]
    repair = ["repair", "--plat", PLATFORM, "--only-plat", *excludes]
    run("auditwheel", *repair, "-w", str(scratch / "repaired"), str(raw), **environment)
    (repaired,) = (scratch / "repaired").glob("*.whl")
    wheel = scratch / repaired.name
    repack_wheel(repaired, wheel, epoch)
    with zipfile.ZipFile(wheel) as archive:
        check_library(Path(archive.extract("mmfast/_C.so", scratch / "unpacked")))
    check_wheel(wheel)
    return wheel


def make_sdist(scratch: Path, epoch: int) -> Path:
    """The sdist, repacked, in `scratch`."""
    run(
        *(sys.executable, "-m", "build", "--sdist", "--no-isolation"),
        *("--outdir", str(scratch / "raw-sdist"), "."),
        SOURCE_DATE_EPOCH=str(epoch),
    )
    (raw,) = (scratch / "raw-sdist").glob("*.tar.gz")
    repack_sdist(raw, scratch / raw.name, epoch)
    return scratch / raw.name


def requirements_of(wheel: Path) -> list[str]:
    """What the wheel's metadata requires without an extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        told = Parser().parsestr(archive.read(name).decode())
    return [line for line in told.get_all("Requires-Dist") or [] if "extra ==" not in line]


def first_version(text: str) -> str:
    """The first version number of what a tool says of itself."""
    found = re.search(r"\d+(\.\d+)+", text)
    return found[0] if found else "unknown"


def sha256(path: Path) -> str:
    """Hexadecimal, as sha256sum prints it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_sums(folder: Path) -> None:
    """SHA256SUMS of the release in the folder, for `sha256sum -c SHA256SUMS`."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.glob("mmfast-*"))]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def release(cuda: bool, output: Path) -> Path:
    """Everything into `output`, in the place of a former release; returns the wheel there."""
    tools = native_build.find_toolchain(with_cuda=False)
    toolkit = None
    if cuda:
        os.environ["MMFAST_CUDA"] = "on"
        toolkit = cuda_build.find_cuda(tools.torch, tools.cxx)
    epoch = source_date()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        made = [make_sdist(scratch, epoch), make_wheel(cuda, scratch, epoch)]
        output.mkdir(parents=True, exist_ok=True)
        for path in output.glob("mmfast-*"):
            path.unlink()
        for path in made:
            shutil.copy(path, output / path.name)
    wheel = output / made[1].name
    from wheel_sbom import write_sbom  # its packages are needed here only

    compiler = run(*shlex.split(tools.cxx), "--version").splitlines()[0]
    versions = {"g++": first_version(compiler)}
    versions["setuptools"] = importlib.metadata.version("setuptools")
    if toolkit:
        versions["nvcc"] = toolkit.version
    write_sbom(
        output / f"{wheel.name}.cdx.json",
        wheel.name,
        sha256(wheel),
        native_build.read_version(),
        epoch,
        requirements_of(wheel),
        versions,
        toolkit.version if toolkit else None,
    )
    write_sums(output)
    return wheel


def main() -> int:
    """Command line: 0 when everything was made and passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", choices=("on", "off"), default="on")
    parser.add_argument("--output", type=Path, help="default: dist, dist/cpu with --cuda off")
    given = parser.parse_args()
    cuda = given.cuda == "on"
    output = given.output or ROOT / "dist" / ("" if cuda else "cpu")
    try:
        wheel = release(cuda, output)
    except cuda_build.SettingError as wrong:
        hint = "; without CUDA kernels: make wheel CUDA=off" if cuda else ""
        print(f"mmfast: {wrong}{hint}", file=sys.stderr)
        return 1
    except (ReleaseError, StubError, native_build.MissingToolError) as reason:
        print(f"mmfast: {reason}", file=sys.stderr)
        return 1
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
