"""Finds nvcc, chooses GPU architectures, and says how csrc/cuda/*.cu are compiled.

Part of tools/native_build.py, which puts it all into one ninja file. Neither a GPU, a driver nor a
CUDA build of torch is needed: the library links the static CUDA runtime and asks torch for nothing
at build time but its version.

MMFAST_CUDA=auto (default): CUDA kernels where the installed torch is a CUDA build and there is an
nvcc that fits it; one line says why not. on: an error where not; a CPU build of torch will do.
off: none.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = "80+PTX;86;89;90;100f;120f+PTX"
"""Machine code for every GPU generation from the A100 on (100f: all of compute capability 10.x,
120f: all of 12.x), and PTX, which the driver compiles: 80 for what lies between, 120 for what is
to come."""
OLDEST_ARCH = 80

WITHOUT = "set MMFAST_CUDA=off to build without CUDA kernels"
HOW_TO_GET_NVCC = (
    "install the CUDA toolkit 12.9 or newer, get it from PyPI by `make nvcc`, or name one with "
    "MMFAST_NVCC or CUDA_HOME"
)


class SettingError(RuntimeError):
    """What was asked for by an environment variable cannot be done; the message says why."""


class _NotPossibleError(RuntimeError):
    """Why CUDA kernels cannot be built: an error under MMFAST_CUDA=on, a remark under auto."""


@dataclass(frozen=True)
class Arch:
    """A GPU architecture as nvcc names it: `number` 90, `letter` "a", "f" or none."""

    number: int
    letter: str = ""
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.number}{self.letter}"


@dataclass(frozen=True)
class Cuda:
    """A toolkit that can compile csrc/cuda, and for which architectures it shall."""

    nvcc: str
    top: Path
    version: str
    library_dir: Path
    host_compiler: str
    archs: tuple[Arch, ...]

    @property
    def name(self) -> str:
        """For a folder of objects: builds for other architectures do not disturb one another."""
        if self.archs == parse_archs(DEFAULT_ARCHS):
            return "cuda"
        return "cuda-" + "_".join(f"{arch}{'ptx' if arch.ptx else ''}" for arch in self.archs)

    def compile_command(self) -> str:
        """nvcc's command line in a ninja rule."""
        return (
            f"{shlex.quote(self.nvcc)} -ccbin {shlex.quote(self.host_compiler)} "
            f"-MMD -MF $out.d $flags -c $in -o $out"
        )

    def compile_flags(self, host_flags: str) -> str:
        """What every .cu is compiled with. `host_flags` are for the C++ compiler behind nvcc."""
        # A quarter of the size, and every driver that CUDA 13 runs on can unpack it.
        smaller = "--compress-mode=size " if _numbers(self.version) >= (12, 8) else ""
        return (
            f"-std=c++17 -O3 -DNDEBUG -DMMFAST_CUDA -Werror all-warnings {smaller}"
            f"{gencode(self.archs)} -Xcompiler {shlex.quote(','.join(host_flags.split()))}"
        )

    def link_flags(self) -> str:
        """The CUDA runtime becomes part of the library, so a user's toolkit does not matter."""
        return f"-L{shlex.quote(str(self.library_dir))} -lcudart_static -lpthread -ldl -lrt"

    def build_info_flags(self) -> str:
        """What the library says of itself (csrc/bindings/capi.cpp)."""
        machine_code = ",".join(map(str, self.archs))
        ptx = ",".join(str(arch.number) for arch in self.archs if arch.ptx)
        return (
            f'-DMMFAST_CUDA_ARCHS=\\"{machine_code}\\" -DMMFAST_CUDA_PTX=\\"{ptx}\\" '
            f'-DMMFAST_CUDA_VERSION=\\"{self.version}\\"'
        )


def gencode(archs: tuple[Arch, ...]) -> str:
    """The -gencode flags. One run of the compiler's front end serves as many as it can: half of
    the time goes there. All of 8.x share that of the oldest, whose instructions are theirs, and
    PTX, which must not be tied to a family, shares with its machine code.
    """
    code: dict[str, list[str]] = {}
    oldest = min(arch.number for arch in archs)
    for arch in archs:
        front = oldest if arch.number < 90 else arch.number
        letter = "" if arch.ptx else arch.letter
        code.setdefault(f"{front}{letter}", []).append(f"sm_{arch}")
        if arch.ptx:
            code.setdefault(str(arch.number), []).append(f"compute_{arch.number}")
    return " ".join(
        f"-gencode 'arch=compute_{front},code=[{','.join(names)}]'" for front, names in code.items()
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def parse_archs(text: str, source: str = "MMFAST_CUDA_ARCHS") -> tuple[Arch, ...]:
    """`80;90a;100f+PTX`, with ; , or blanks between, and 8.0 for 80. Raises SettingError."""
    found: dict[tuple[int, str], Arch] = {}
    for word in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d{1,2})\.?(\d)([af]?)(\+PTX)?", word, re.I)
        if match is None:
            raise SettingError(
                f"{source}={text}: {word!r} is no GPU architecture; write them as {DEFAULT_ARCHS}"
            )
        arch = Arch(int(match[1] + match[2]), match[3].lower(), match[4] is not None)
        found[arch.number, arch.letter] = arch
    return tuple(found[key] for key in sorted(found))


def wanted_archs() -> tuple[Arch, ...]:
    """MMFAST_CUDA_ARCHS, else what TORCH_CUDA_ARCH_LIST has from 8.0 on, else the default."""
    asked = os.environ.get("MMFAST_CUDA_ARCHS", "").strip()
    if asked:
        archs = parse_archs(asked)
        old = [str(arch) for arch in archs if arch.number < OLDEST_ARCH]
        if old:
            raise SettingError(
                f"MMFAST_CUDA_ARCHS={asked}: the CUDA kernels need compute capability 8.0 or "
                f"newer; leave out {', '.join(old)}"
            )
        return archs
    torch_list = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if torch_list:
        # Such a list is often one for a whole machine room, older GPUs included.
        archs = parse_archs(torch_list, "TORCH_CUDA_ARCH_LIST")
        kept = tuple(arch for arch in archs if arch.number >= OLDEST_ARCH)
        if not kept:
            raise SettingError(
                f"TORCH_CUDA_ARCH_LIST={torch_list}: the CUDA kernels need compute capability 8.0 "
                f"or newer; name one in MMFAST_CUDA_ARCHS, or {WITHOUT}"
            )
        return kept
    return parse_archs(DEFAULT_ARCHS)


def find_nvcc() -> str:
    """MMFAST_NVCC, else CUDA_HOME, PATH, /usr/local/cuda, and last PyPI's packages."""
    asked = os.environ.get("MMFAST_NVCC", "").strip()
    if asked:
        program = shutil.which(asked)
        if program is None:
            raise _NotPossibleError(f"MMFAST_NVCC={asked} names no program; {HOW_TO_GET_NVCC}")
        return program
    home = os.environ.get("CUDA_HOME", "").strip()
    if home:
        program = shutil.which(str(Path(home) / "bin" / "nvcc"))
        if program is None:
            raise _NotPossibleError(f"CUDA_HOME={home} has no bin/nvcc; {HOW_TO_GET_NVCC}")
        return program
    for name in ("nvcc", "/usr/local/cuda/bin/nvcc", *_nvcc_of_pypi()):
        program = shutil.which(name)
        if program is not None:
            return program
    raise _NotPossibleError(f"no nvcc found; {HOW_TO_GET_NVCC}")


def _nvcc_of_pypi() -> list[str]:
    """Where the package nvidia-cuda-nvcc puts it in the running Python's environment."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    return [str(p) for folder in folders or () for p in Path(folder).glob("cu[0-9]*/bin/nvcc")]


def run_nvcc(nvcc: str, *arguments: str) -> tuple[int, str]:
    """(exit status, all output) of nvcc in an empty folder with an empty source `empty.cu`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "empty.cu").touch()
        try:
            done = subprocess.run(
                [nvcc, *arguments],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            return 1, str(error)
    return done.returncode, done.stdout


def toolkit_of(nvcc: str) -> tuple[Path, str, Path]:
    """(folder, version, folder of the static runtime). nvcc on PATH may be a script elsewhere."""
    _, told = run_nvcc(nvcc, "--version")
    version = re.search(r"\brelease (\d+\.\d+)", told)
    _, steps = run_nvcc(nvcc, "--dryrun", "empty.cu")
    top = re.search(r"^#\$ TOP=(.+)$", steps, re.M)
    if version is None or top is None:
        said = " ".join((told if version is None else steps).split())[:60]
        raise _NotPossibleError(f"{nvcc} does not answer as nvcc does ({said}); {HOW_TO_GET_NVCC}")
    folder = Path(top[1].strip()).resolve()
    listed = re.search(r"^#\$ LIBRARIES=(.*)$", steps, re.M)
    places = [Path(place) for place in re.findall(r'"-L([^"]+)"', listed[1] if listed else "")]
    for place in [*places, folder / "lib64", folder / "lib"]:
        if (place / "libcudart_static.a").exists():
            return folder, version[1], place.resolve()
    raise _NotPossibleError(
        f"the CUDA toolkit in {folder} has no libcudart_static.a; install its runtime for "
        "developers (Debian, Ubuntu: cuda-cudart-dev; PyPI: nvidia-cuda-runtime)"
    )


def cuda_of_torch(torch: Path) -> str | None:
    """The CUDA version that the installed torch was built with, None for a CPU build."""
    text = (torch / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+\.\d+)", text, re.M)
    return found[1] if found else None


def check_versions(toolkit: str, torch: str | None) -> None:
    """Raises unless both are of one major version: only such are promised to get on."""
    if torch is not None and torch.partition(".")[0] != toolkit.partition(".")[0]:
        raise _NotPossibleError(
            f"nvcc is of CUDA {toolkit} but torch was built with CUDA {torch}; install the CUDA "
            f"{torch.partition('.')[0]} toolkit and name it with CUDA_HOME, or {WITHOUT}"
        )


def check_archs(nvcc: str, version: str, host_compiler: str, archs: tuple[Arch, ...]) -> None:
    """Raises SettingError for an architecture that this nvcc does not know."""
    for arch in archs:
        flags = shlex.split(gencode((arch,)))
        status, said = run_nvcc(nvcc, "--dryrun", "-ccbin", host_compiler, *flags, "empty.cu")
        if status != 0 and "architecture" in said:
            raise SettingError(
                f"nvcc of CUDA {version} does not know the GPU architecture {arch}; name others in "
                f"MMFAST_CUDA_ARCHS, such as {DEFAULT_ARCHS}, or install a newer CUDA toolkit"
            )


def check_host_compiler(nvcc: str, version: str, host_compiler: str) -> None:
    """Raises unless nvcc gets on with the C++ compiler; it refuses those newer than itself."""
    status, said = run_nvcc(nvcc, "-E", "-ccbin", host_compiler, "empty.cu", "-o", "empty.ii")
    if status == 0:
        return
    newest = re.search(r"unsupported \w+ version!.*?(gcc|clang)\D*?(?:later than|<) ?(\d+)", said)
    if newest or "unsupported" in said:
        most = f", which takes {newest[1]} up to {newest[2]}" if newest else ""
        raise _NotPossibleError(
            f"{host_compiler} is too new for nvcc of CUDA {version}{most}; name an older one with "
            f"CXX, or {WITHOUT}"
        )
    first = next((line.strip() for line in said.splitlines() if line.strip()), "it says nothing")
    raise _NotPossibleError(f"nvcc of CUDA {version} cannot use {host_compiler} ({first})")


def host_compiler_of(cxx: str) -> str:
    """The compiler itself where CXX is a command such as `ccache g++`: nvcc takes a program."""
    return shlex.split(cxx)[-1]


def find_cuda(torch: Path, cxx: str) -> Cuda | None:
    """The toolkit to use, or None for a build without CUDA kernels. Raises SettingError."""
    mode = os.environ.get("MMFAST_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        raise SettingError(f"MMFAST_CUDA={mode} is not known; use auto, on or off")
    torch_cuda = cuda_of_torch(torch)
    if mode == "off" or (mode == "auto" and torch_cuda is None):
        return None
    archs = wanted_archs()
    host_compiler = host_compiler_of(cxx)
    try:
        nvcc = find_nvcc()
        top, version, library_dir = toolkit_of(nvcc)
        check_versions(version, torch_cuda)
        check_host_compiler(nvcc, version, host_compiler)
        check_archs(nvcc, version, host_compiler, archs)
    except _NotPossibleError as reason:
        if mode == "on":
            raise SettingError(f"MMFAST_CUDA=on, but {reason}") from None
        print(f"mmfast: building without CUDA kernels: {reason}", file=sys.stderr)
        return None
    return Cuda(nvcc, top, version, library_dir, host_compiler, archs)
