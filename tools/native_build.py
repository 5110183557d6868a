"""Compiles csrc/ into mmfast/_C.so (and the optional mmfast/_pyb) with ninja.

setup.py imports this file; the Makefile and tools/sanitize.py run it as a program. It needs
neither setuptools nor an imported torch: it only looks for torch's headers and libraries.

A source file's flags follow from its name (see `SUFFIX_FLAGS`), so a new kernel needs no line
here. What concerns nvcc is in tools/cuda_build.py.

MMFAST_SYSROOT names a folder whose include/ and lib/ come before the system's: an older C library
to be compatible with. `make wheel` makes one (tools/wheel_sysroot.py).
"""

from __future__ import annotations

import argparse
import fcntl
import filecmp
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import cuda_build
from cuda_build import Cuda, SettingError

ROOT = Path(__file__).resolve().parent.parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

# The oldest torch whose stable ABI the library may use. One binary then loads in every later torch.
TORCH_TARGET = (2, 10)
TORCH_TARGET_MACRO = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"

AVX2 = ("-mavx2", "-mfma", "-mf16c")
# g++ 12 warns of uninitialised values inside its own AVX-512 intrinsics.
AVX512 = (
    *AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
)
AVX512_BF16 = (*AVX512, "-mavx512bf16")
AMX = (*AVX512_BF16, "-mamx-tile", "-mamx-bf16")

# How a csrc/cpu file name ends -> the flags it adds to the baseline. The first match counts.
SUFFIX_FLAGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("_amx_emulated.cpp", AVX512_BF16),
    ("_amx.cpp", AMX),
    ("_avx512_bf16.cpp", AVX512_BF16),
    ("_avx512.cpp", AVX512),
    ("_avx2.cpp", AVX2),
)
BASELINE = ("-march=x86-64-v2",) if X86 else ()

# -fvisibility=hidden: only the C entry points leave the library.
# -ffp-contract=fast, -fno-math-errno: fused multiply-adds and inline sqrt; never -ffast-math,
# which would drop the NaN and infinity rules the ops promise.
COMMON_FLAGS = (
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",  # g++ 12 reports it of vectors that are filled lane by lane
)
# What leaves the library: not the static CUDA runtime, nor what the compiler shares out weakly.
EXPORTS = "{ global: mmfast_*; local: *; };\n"
SANITIZERS = {
    "asan": (
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ),
    "tsan": ("-fsanitize=thread", "-fno-omit-frame-pointer"),
}


class MissingToolError(RuntimeError):
    """Something needed for compiling is absent; the message says what and how to get it."""


class CompileError(RuntimeError):
    """The compiler or the linker rejected something; its output is already on the terminal."""


@dataclass(frozen=True)
class Options:
    """What is built. `sanitizer` is a key of `SANITIZERS` or empty; with one there is no CUDA."""

    output: Path = ROOT / "mmfast"
    emulate_amx: bool = False
    sanitizer: str = ""
    pyb: bool = False
    sysroot: Path | None = None


@dataclass(frozen=True)
class Toolchain:
    """Where the compiler, ninja and torch are, and nvcc where CUDA kernels are built."""

    cxx: str
    ninja: str
    torch: Path
    cuda: Cuda | None = None


def build_dir(options: Options) -> Path:
    """Object files of different flags never share a folder, so switching costs nothing."""
    parts = ["native"]
    if options.emulate_amx:
        parts.append("emulated-amx")
    if options.sysroot:
        parts.append("sysroot")
    if options.sanitizer:
        parts.append(options.sanitizer)
    return ROOT / "build" / "-".join(parts)


def variant_dir(cuda: Cuda | None) -> Path:
    """Below `build_dir`, what is another with CUDA kernels: bindings, GPU code and the library.
    The processor's kernels are the same and are compiled once."""
    return Path(cuda.name) if cuda else Path("obj")


def read_version() -> str:
    """The package version, from mmfast/_version.py, without importing the package."""
    text = (ROOT / "mmfast" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "([^"]+)"', text)
    if found is None:
        raise MissingToolError('mmfast/_version.py has no line __version__ = "..."')
    return found.group(1)


def find_compiler() -> str:
    """CXX if it is set, otherwise the first of c++, g++ and clang++."""
    asked = os.environ.get("CXX", "").strip()
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    what = f"CXX={asked} names no program" if asked else "no C++ compiler found"
    raise MissingToolError(
        f"{what}; install g++ 11 or newer (Debian, Ubuntu: apt-get install g++), or set CXX"
    )


def find_ninja() -> str:
    """The ninja of the `ninja` package, otherwise the one on PATH."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        program = Path(ninja.BIN_DIR) / "ninja"
        if program.exists():
            return str(program)
    program_on_path = shutil.which("ninja")
    if program_on_path is None:
        raise MissingToolError("ninja not found; pip install ninja")
    return program_on_path


def find_torch() -> Path:
    """The folder of the installed torch package, checked for its version and headers."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise MissingToolError("torch not found; install torch first and build without isolation")
    torch = Path(next(iter(spec.submodule_search_locations)))
    need = ".".join(map(str, TORCH_TARGET))
    found = re.search(
        r"__version__ = ['\"](\d+)\.(\d+)([^'\"]*)", (torch / "version.py").read_text()
    )
    if found is None or (int(found[1]), int(found[2])) < TORCH_TARGET:
        got = "of unknown version" if found is None else f"{found[1]}.{found[2]}{found[3]}"
        raise MissingToolError(f"torch {got} is too old; install torch {need} or newer")
    if not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        raise MissingToolError("this torch has no C++ headers; install torch from its wheel")
    return torch


def find_toolchain(with_cuda: bool = True) -> Toolchain:
    """Everything compiling needs. Raises MissingToolError with one sentence otherwise.

    SettingError: MMFAST_CUDA or one of its companions asks for what cannot be.
    """
    if platform.system() != "Linux":
        raise MissingToolError("the compiled library is built on Linux only")
    cpu = ROOT / "csrc" / "cpu"
    if not any(cpu.glob("*.cpp")):
        raise MissingToolError("csrc/cpu has no sources; use a complete checkout or sdist")
    cxx, ninja, torch = find_compiler(), find_ninja(), find_torch()
    return Toolchain(cxx, ninja, torch, cuda_build.find_cuda(torch, cxx) if with_cuda else None)


def kernel_flags(name: str) -> tuple[str, ...] | None:
    """The instruction-set flags of a csrc/cpu file, or None where it is not compiled at all."""
    for suffix, flags in SUFFIX_FLAGS:
        if name.endswith(suffix):
            return (*BASELINE, *flags) if X86 else None
    return BASELINE


def sources_and_flags(
    emulate_amx: bool, cuda: Cuda | None = None
) -> list[tuple[Path, tuple[str, ...]]]:
    """Every C++ source of _C.so with the flags that are its own, in a stable order."""
    csrc = ROOT / "csrc"
    found: list[tuple[Path, tuple[str, ...]]] = []
    for path in sorted([*csrc.glob("cpu/*.cpp"), *csrc.glob("common/*.cpp")]):
        flags = kernel_flags(path.name)
        if flags is None or (path.name.endswith("_amx_emulated.cpp") and not emulate_amx):
            continue
        found.append((path, ("-std=c++17", *flags)))
    for path in sorted(csrc.glob("bindings/*.cpp")):
        if path.name == "pyb.cpp" or (path.name.startswith("cuda_") and cuda is None):
            continue
        own = ("-DMMFAST_CUDA",) if cuda else ()
        if cuda and path.name == "capi.cpp":
            own += (cuda.build_info_flags(),)
        found.append((path, ("-std=c++20", *BASELINE, *own)))
    return found


def cuda_sources(cuda: Cuda | None) -> list[Path]:
    """What nvcc compiles, in a stable order."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if cuda else []


def pyb_rule_values() -> tuple[str, str]:
    """(include flags, file name) of the pybind11 module for the running Python."""
    header_dir = Path(sysconfig.get_path("include"))
    if not (header_dir / "Python.h").exists():
        raise MissingToolError("Python.h not found; install the Python development package")
    if importlib.util.find_spec("pybind11") is None:
        raise MissingToolError("pybind11 not found; pip install pybind11")
    import pybind11

    includes = f"-isystem {quote(header_dir)} -isystem {quote(Path(pybind11.get_include()))}"
    return includes, "_pyb" + str(sysconfig.get_config_var("EXT_SUFFIX"))


def quote(path: Path) -> str:
    """A path for a shell command inside a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")


def ninja_path(path: Path) -> str:
    """A path in a ninja build line, where blank, colon and dollar are special."""
    return re.sub(r"([ :$])", r"$\1", str(path))


def ninja_file(options: Options, tools: Toolchain) -> str:
    """The text of build.ninja."""
    torch = tools.torch
    sanitize = SANITIZERS.get(options.sanitizer, ())
    optimise = ("-O1", "-g") if sanitize else ("-O3", "-DNDEBUG")
    emulate = ("-DMMFAST_EMULATE_AMX",) if options.emulate_amx else ()
    common = " ".join([*optimise, *COMMON_FLAGS, *sanitize, *emulate])
    own_include = f"-I{quote(ROOT / 'csrc')}"
    # A wheel is the same wherever it is built: no machine's paths, not even those of messages.
    neutral = older = ""
    if options.sysroot:
        include = options.sysroot / "include"
        neutral = f"-I{quote(include)} -ffile-prefix-map={quote(ROOT)}=."
        common += f" {neutral}"
        older = f"-include {quote(include / 'older.h')}"
    # Kernels take raw pointers: only the bindings see torch's headers, and the version.
    version = f'-DMMFAST_VERSION=\\"{read_version()}\\"'
    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_MACRO} "
    target += f'-DMMFAST_TORCH_TARGET=\\"{".".join(map(str, TORCH_TARGET))}\\"'
    bindings_only = f"{version} {target} {older} -isystem {quote(torch / 'include')}"
    if options.sysroot:
        bindings_only += f" -ffile-prefix-map={quote(torch)}=torch"
    # libtorch.so has to be in the list of needed libraries although no symbol asks for it at link
    # time: under a CUDA torch it is what makes torch's CUDA symbols visible to the weak look-ups.
    # No rpath: torch is imported before the library is loaded, so its libraries are there by name.
    link = " ".join(
        [
            "-shared -Wl,--version-script=exports.map -Wl,-z,defs -Wl,-z,relro -Wl,-z,now",
            *sanitize,
            *([f"-s -L{quote(options.sysroot / 'lib')}"] if options.sysroot else []),
            f"-L{quote(torch / 'lib')} -Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,--as-needed",
            *([tools.cuda.link_flags()] if tools.cuda else []),
        ]
    )
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {tools.cxx} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $label",
        "rule link",
        f"  command = {tools.cxx} $in -o $out $flags",
        "  description = link $out",
    ]
    if tools.cuda:
        lines += [
            "rule compile_cuda",
            f"  command = {tools.cuda.compile_command()}",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $label",
        ]
    objects: dict[str, list[str]] = {"library": [], "pyb": []}
    variant = variant_dir(tools.cuda)

    def compile_step(group: str, source: Path, flags: str, rule: str = "compile") -> None:
        relative = source.relative_to(ROOT)
        folder = Path("obj") if source.parent.name in ("cpu", "common") else variant
        target = ninja_path(folder / relative.with_suffix(".o"))
        objects[group].append(target)
        lines.append(f"build {target}: {rule} {ninja_path(source)}")
        lines.append(f"  flags = {flags}")
        lines.append(f"  label = {relative}")

    # nvcc's files first: they take longest.
    for source in cuda_sources(tools.cuda):
        flags = tools.cuda.compile_flags(f"-fPIC -fvisibility=hidden {neutral}")
        compile_step("library", source, f"{flags} {older} {own_include}", "compile_cuda")
    for source, flags in sources_and_flags(options.emulate_amx, tools.cuda):
        extra = bindings_only if source.parent.name == "bindings" else ""
        compile_step("library", source, f"{common} {' '.join(flags)} {own_include} {extra}")
    outputs = [ninja_path(variant / "_C.so")]
    lines += [f"build {outputs[0]}: link {' '.join(objects['library'])}", f"  flags = {link}"]
    if options.pyb:
        includes, name = pyb_rule_values()
        flags = f"{common} {version} -std=c++17 {' '.join(BASELINE)} {own_include} {includes}"
        compile_step("pyb", ROOT / "csrc" / "bindings" / "pyb.cpp", flags)
        outputs.append(ninja_path(variant / name))
        lines += [
            f"build {outputs[1]}: link {' '.join(objects['pyb'])}",
            f"  flags = -shared {' '.join(sanitize)}",
        ]
    lines.append(f"default {' '.join(outputs)}")
    return "\n".join(lines) + "\n"


def jobs() -> int:
    """MAX_JOBS if it is set, otherwise the processors this process may use."""
    asked = os.environ.get("MAX_JOBS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else len(os.sched_getaffinity(0))


def build(options: Options) -> list[Path]:
    """Builds and returns the files made. Raises MissingToolError, SettingError or CompileError."""
    tools = find_toolchain(with_cuda=not options.sanitizer)
    folder = build_dir(options)
    folder.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    text = ninja_file(options, tools)
    names = ["_C.so", *([pyb_rule_values()[1]] if options.pyb else [])]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds in one folder would break each other
        (folder / "build.ninja").write_text(text, encoding="utf-8")
        (folder / "exports.map").write_text(EXPORTS, encoding="utf-8")
        command = [tools.ninja, "-C", str(folder), "-j", str(jobs())]
        plan = subprocess.run([*command, "-n"], check=False, capture_output=True, text=True)
        there_is_work = "no work to do" not in plan.stdout
        if there_is_work and subprocess.run(command, check=False).returncode != 0:
            raise CompileError("compiling csrc/ failed; the compiler's messages are above")
        made = folder / variant_dir(tools.cuda)
        return [put(made / name, options.output / name) for name in names]


def put(made: Path, target: Path) -> Path:
    """Copies what was linked to where it is used, unless it is there; never into a mapped file.

    Builds with different options share the target: its content says whether it is up to date.
    """
    if not (target.is_file() and filecmp.cmp(made, target)):
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(made, aside)
        aside.replace(target)
    return target


def sysroot() -> Path | None:
    """MMFAST_SYSROOT as a path."""
    asked = os.environ.get("MMFAST_SYSROOT", "").strip()
    if not asked:
        return None
    if not (Path(asked) / "lib").is_dir():
        raise SettingError(f"MMFAST_SYSROOT={asked} has no folder lib; `make wheel` makes one")
    return Path(asked).absolute()


def flag(name: str) -> bool:
    """Whether an environment variable is 1."""
    return os.environ.get(name, "0") == "1"


def main() -> int:
    """Command line: 0 built, or nothing to build with under MMFAST_BUILD=auto; 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "mmfast", help="folder for _C.so")
    parser.add_argument("--sanitizer", choices=sorted(SANITIZERS), default="")
    parser.add_argument("--pyb", action="store_true", help="also build mmfast/_pyb")
    given = parser.parse_args()
    mode = os.environ.get("MMFAST_BUILD", "auto")
    if mode == "off":
        return 0
    pyb = given.pyb
    try:
        if pyb:
            pyb_rule_values()
    except MissingToolError as missing:
        print(f"mmfast: the optional mmfast._pyb was not built: {missing}", file=sys.stderr)
        pyb = False
    output = given.output.absolute()
    try:
        build(Options(output, flag("MMFAST_EMULATE_AMX"), given.sanitizer, pyb, sysroot()))
    except MissingToolError as missing:
        print(f"mmfast: the compiled library was not built: {missing}", file=sys.stderr)
        needed = mode == "on" or os.environ.get("MMFAST_CUDA") == "on" or given.sanitizer
        return 1 if needed else 0
    except (CompileError, SettingError) as failure:
        print(f"mmfast: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
