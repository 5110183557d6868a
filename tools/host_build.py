"""Compiles the CUDA kernels of csrc/cuda for the CPU: the library that tests run them with.

    python tools/host_build.py [plain] [asan] [tsan] [--ops glu,fuse] [--widths 64]

The .cu files are compiled as C++ against csrc/host, with the bindings csrc/bindings/cuda_*.cpp,
into build/host-<mode>/libmmfast_host.so, which registers torch.ops.mmfast_host.* for CPU tensors.
Modes: plain (-O2), asan (AddressSanitizer and UBSan), tsan (ThreadSanitizer). No CUDA toolkit is
needed. Nothing is compiled twice that has not changed.

MMFAST_HOST_OPS=glu,fuse in the environment leaves the other ops out, as --ops does, and
MMFAST_HOST_WIDTHS=64 the other head widths: sanitizers take minutes for everything.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import native_build
from native_build import (
    COMMON_FLAGS,
    ROOT,
    SANITIZERS,
    TORCH_TARGET_MACRO,
    X86,
    CompileError,
    MissingToolError,
    ninja_path,
    quote,
)

MODES = ("plain", "asan", "tsan")
LIBRARY = "libmmfast_host.so"
NAMESPACE = "mmfast_host"

# Files that several ops need.
SHARED = ("column_sums",)

HEAD_WIDTHS = (32, 64, 96, 128, 256)

# Files of csrc/cuda that talk to the driver: csrc/host has its own idea of a device.
GPU_ONLY = ("limits.cu",)

# Calls to torch, and checks of g++ 12 that misfire on arrays which are filled element by element.
WARNINGS_OFF = ("-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-uninitialized")

# Checks of UBSan that double the time of compiling and have no say in kernels: AddressSanitizer
# sees where pointers lead.
UNDEFINED_OFF = ("-fno-sanitize=null,object-size,pointer-overflow,vptr",)


@dataclass(frozen=True)
class HostOptions:
    """What is compiled.

    `name` sets a second library beside the first, with ops of its own (mmfast_host_<name>), made
    from another tree `csrc`: that is how a fault is planted in a real kernel. `ops` are the
    beginnings of the files that take part, all where it is empty. `widths` are the head widths
    that launchers are built for, all where it is empty. `sources` replaces all kernels and
    bindings, and torch: for kernels that only tests have.
    """

    mode: str = "plain"
    name: str = ""
    csrc: Path = ROOT / "csrc"
    ops: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    defines: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        """Objects of different flags never share a folder."""
        parts = ["host", self.mode, *([self.name] if self.name else [])]
        parts += ["w" + "_".join(map(str, self.widths))] if self.widths else []
        parts += ["_".join(self.ops)] if self.ops else []
        return ROOT / "build" / "-".join(parts)

    @property
    def namespace(self) -> str:
        """Where torch has the ops."""
        return f"{NAMESPACE}_{self.name}" if self.name else NAMESPACE


def processor_flags() -> tuple[str, ...]:
    """The library runs where it is built, so it may use what there is: mma takes AVX2 and FMA."""
    if not X86:
        return ()
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()
    wanted = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c"}
    return tuple(wanted.values()) if wanted.keys() <= words else native_build.BASELINE


def kernel_sources(options: HostOptions) -> list[Path]:
    """The .cu files and bindings that take part, in a stable order."""
    if options.sources:
        return list(options.sources)
    cuda = sorted((options.csrc / "cuda").glob("*.cu"))
    found = [
        *((path, path.name) for path in cuda if path.name not in GPU_ONLY),
        *(
            (path, path.name.removeprefix("cuda_"))
            for path in sorted((options.csrc / "bindings").glob("cuda_*.cpp"))
        ),
    ]
    ops = options.ops
    # A file of one head width says so at the end of its name.
    other = [f"_{width}.cu" for width in HEAD_WIDTHS if width not in options.widths]
    left_out = tuple(other) if options.widths else ()
    return [
        path
        for path, name in found
        if (not ops or name.startswith((*ops, *SHARED))) and not name.endswith(left_out)
    ]


def compile_flags(options: HostOptions) -> tuple[str, ...]:
    """Flags of every file but those of csrc/host, which have no sanitizer."""
    sanitize = SANITIZERS.get(options.mode, ())
    optimise = ("-O1", "-g1") if sanitize else ("-O2",)
    return (
        "-std=c++20",
        *optimise,
        *COMMON_FLAGS,
        *WARNINGS_OFF,
        *processor_flags(),
        *sanitize,
        *(UNDEFINED_OFF if sanitize else ()),
        *mode_defines(options),
    )


def mode_defines(options: HostOptions) -> tuple[str, ...]:
    """Macros that kernels, bindings and csrc/host all see."""
    widths = ",".join(map(str, options.widths))
    return (
        "-DMMFAST_HOST_RUN",
        f"-DMMFAST_HOST_NAMESPACE={options.namespace}",
        *((f"-DMMFAST_HOST_{options.mode.upper()}",) if options.mode != "plain" else ()),
        *((f"'-DMMFAST_ONLY_WIDTHS={widths}'",) if widths else ()),
        *(f"-D{define}" for define in options.defines),
    )


def runtime_flags(options: HostOptions) -> tuple[str, ...]:
    """Flags of csrc/host: what the sanitizers report shall be the kernels' doing alone."""
    return (
        *("-std=c++20", "-O2", "-g", *COMMON_FLAGS, *processor_flags()),
        *mode_defines(options),
    )


def ninja_file(options: HostOptions, cxx: str, torch: Path) -> str:
    """The text of build.ninja."""
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {cxx} -MMD -MF $out.d $flags -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $label",
        "rule link",
        f"  command = {cxx} $in -o $out $flags",
        "  description = link $out",
    ]
    objects = []

    def compile_step(source: Path, flags: tuple[str, ...]) -> None:
        own_tree = source.is_relative_to(options.csrc.parent)
        relative = source.relative_to(options.csrc.parent) if own_tree else Path(source.name)
        target = ninja_path(Path("obj") / f"{relative}.o")
        objects.append(target)
        lines.append(f"build {target}: compile {ninja_path(source)}")
        lines.append(f"  flags = {' '.join(flags)}")
        lines.append(f"  label = {relative} ({options.mode})")

    own = compile_flags(options)
    with_torch = (f"-DTORCH_TARGET_VERSION={TORCH_TARGET_MACRO}", "-isystem")
    for source in kernel_sources(options):
        extra = (*with_torch, quote(torch / "include")) if source.suffix == ".cpp" else ()
        compile_step(source, (*own, f"-I{quote(options.csrc)}", *extra))
    for source in sorted((options.csrc / "host").glob("*.cpp")):
        compile_step(source, runtime_flags(options))
    link = (
        *("-shared", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs", *SANITIZERS.get(options.mode, ())),
    )
    if not options.sources:
        link += (f"-L{quote(torch / 'lib')}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu")
    lines += [f"build {LIBRARY}: link {' '.join(objects)}", f"  flags = {' '.join(link)}"]
    lines.append(f"default {LIBRARY}")
    return "\n".join(lines) + "\n"


def asked_ops() -> tuple[str, ...]:
    """MMFAST_HOST_OPS as a tuple."""
    return tuple(op for op in os.environ.get("MMFAST_HOST_OPS", "").split(",") if op)


def asked_widths() -> tuple[int, ...]:
    """MMFAST_HOST_WIDTHS as a tuple."""
    return tuple(
        int(width) for width in os.environ.get("MMFAST_HOST_WIDTHS", "").split(",") if width
    )


def build(
    mode: str = "plain",
    *,
    name: str = "",
    csrc: Path = ROOT / "csrc",
    ops: tuple[str, ...] | None = None,
    widths: tuple[int, ...] | None = None,
    defines: tuple[str, ...] = (),
    sources: tuple[Path, ...] = (),
) -> Path:
    """Builds what these `HostOptions` say and returns the library's path.

    `ops` and `widths` are those of the environment where they are not given.

    Raises MissingToolError where nothing can be compiled, CompileError where something is wrong.
    """
    chosen = asked_ops() if ops is None else ops
    built = asked_widths() if widths is None else widths
    return build_options(HostOptions(mode, name, csrc, chosen, built, defines, sources))


def build_options(options: HostOptions) -> Path:
    """See `build`."""
    if options.mode not in MODES:
        raise ValueError(f"no mode {options.mode!r}; there are {', '.join(MODES)}")
    cxx = native_build.find_compiler()
    ninja = native_build.find_ninja()
    text = ninja_file(options, cxx, native_build.find_torch())
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds in one folder would break each other
        rules = folder / "build.ninja"
        if not rules.exists() or rules.read_text(encoding="utf-8") != text:
            rules.write_text(text, encoding="utf-8")
        command = [ninja, "-C", str(folder), "-j", str(native_build.jobs())]
        plan = subprocess.run([*command, "-n"], check=False, capture_output=True, text=True)
        there_is_work = "no work to do" not in plan.stdout
        if there_is_work and subprocess.run(command, check=False, stdout=sys.stderr).returncode:
            raise CompileError("compiling csrc/cuda for the CPU failed; the messages are above")
    return folder / LIBRARY


def main() -> int:
    """Command line: 0 built, 1 not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modes", nargs="*", choices=MODES, default=["plain"])
    parser.add_argument("--ops", default=",".join(asked_ops()), help="beginnings of file names")
    parser.add_argument(
        "--widths",
        default=",".join(map(str, asked_widths())),
        help="head widths to build for: 64,128",
    )
    given = parser.parse_args()
    ops = tuple(op for op in given.ops.split(",") if op)
    widths = tuple(int(width) for width in given.widths.split(",") if width)
    try:
        for mode in given.modes:
            print(build(mode, ops=ops, widths=widths))
    except (MissingToolError, CompileError) as failure:
        print(f"host_build: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
