"""The package map and the build of the compiled library (its rules: tools/native_build.py).

MMFAST_BUILD=auto (default): compile when a compiler, ninja and torch's headers are there, say so
and go on without the library when not. on: an error when they are not. off: do not compile.
MMFAST_CUDA=auto|on|off: CUDA kernels too (tools/cuda_build.py says when and how).
MMFAST_PYB=1: put the pybind11 module mmfast._pyb into the wheel too, which ties it to one Python.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    sys.exit("mmfast: setuptools is too old to build this; pip install 'setuptools>=77'")

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import native_build  # noqa: E402  (build backends do not put the project on sys.path)

MODE = os.environ.get("MMFAST_BUILD", "auto")
if MODE not in ("auto", "on", "off"):
    sys.exit(f"mmfast: MMFAST_BUILD={MODE} is not known; use auto, on or off")
PYB = native_build.flag("MMFAST_PYB")


class NativeBuildExt(build_ext):
    """Hands the whole build to ninja; setuptools only learns which files came out."""

    def get_ext_filename(self, fullname: str) -> str:
        """`mmfast/_C.so`, without a Python tag: the library knows no Python."""
        if fullname.endswith("_C"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        """Builds into build_lib, or into the tree for an editable install."""
        output = ROOT / "mmfast" if self.inplace else Path(self.build_lib).absolute() / "mmfast"
        try:
            options = native_build.Options(
                output=output,
                emulate_amx=native_build.flag("MMFAST_EMULATE_AMX"),
                pyb=PYB,
                sysroot=native_build.sysroot(),
            )
            native_build.build(options)
        except native_build.SettingError as wrong:
            sys.exit(f"mmfast: {wrong}")
        except (native_build.MissingToolError, native_build.CompileError) as reason:
            self.give_up(str(reason))

    def give_up(self, reason: str) -> None:
        """An error where asked for by name; otherwise one line, and an install without library."""
        for name in ("MMFAST_BUILD", "MMFAST_CUDA"):
            if os.environ.get(name) == "on":
                sys.exit(f"mmfast: {name}=on, but {reason}")
        print(f"mmfast: installing without the compiled library: {reason}", file=sys.stderr)
        self.extensions = []


class NativeWheel(bdist_wheel):
    """Tags the wheel by what is in it: py3-none-<platform> with the library, -any without."""

    def run(self) -> None:
        """Starts from an empty build_lib, so that no deleted file lives on in a wheel."""
        if not self.distribution.have_run.get("build"):
            shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """The library is Python-free; only mmfast._pyb needs the tag of one Python."""
        if not self.get_finalized_command("build_ext").extensions:
            self.root_is_pure = True
            return "py3", "none", "any"
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if PYB else ("py3", "none", platform)


def extensions() -> list[Extension]:
    """The files the build makes. Their sources are found by tools/native_build.py."""
    if MODE == "off":
        return []
    names = ["mmfast._C", "mmfast._pyb"] if PYB else ["mmfast._C"]
    return [Extension(name, sources=[]) for name in names]


setup(
    # kernels/ lies beside mmfast/ in the tree and is mmfast.kernels once installed.
    package_dir={"mmfast": "mmfast", "mmfast.kernels": "kernels"},
    packages=[*find_packages(include=["mmfast", "mmfast.*"]), "mmfast.kernels"],
    ext_modules=extensions(),
    cmdclass={"build_ext": NativeBuildExt, "bdist_wheel": NativeWheel},
)
