"""Makes a folder that lets this machine's g++ build for glibc 2.28: manylinux without a container.

    lib/      stubs of glibc 2.28's libraries: the names and versions of their symbols, no code.
              Linked before the system's, they make the linker choose the old versions; what only
              a newer glibc has is then an undefined symbol, an error under `-z defs`. The
              compiler in PyPI's package `ziglang` makes them; nothing is compiled or linked by it.
    include/  two headers. libstdc++ asks sys/single_threaded.h, which glibc has since 2.32, whether
              there are other threads: here the answer is always that there may be. older.h, which
              is included before everything else, keeps to the libstdc++ of GCC 8: what later ones
              export besides becomes part of the library.

tools/native_build.py uses the folder that MMFAST_SYSROOT names.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

GLIBC = "2.28"
LIBRARIES = ("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1")
LOADER = "libld.so.2"

SINGLE_THREADED = """\
// Takes the place of glibc 2.32's header, whose variable an older glibc lacks.
#pragma once
static constexpr char __libc_single_threaded = 0;
"""
OLDER = """\
// For a libstdc++.so of GCC 8. Newer ones have more of std::stringstream compiled: here it is
// compiled into the objects that use it, and so is the one function that newer headers call.
// Streams and their locales stay libstdc++'s: a facet of ours would be unknown to it.
#pragma once
#include <new>
namespace std {
[[noreturn]] inline void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#include <istream>
#include <string>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <sstream>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 1
"""
HEADERS = {"sys/single_threaded.h": SINGLE_THREADED, "older.h": OLDER}


class StubError(RuntimeError):
    """The stubs could not be made; the message says why."""


def make_sysroot(folder: Path, glibc: str = GLIBC) -> Path:
    """Fills `folder`, unless it is there from before, and returns it. Raises StubError."""
    if (folder / f"glibc-{glibc}").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "sysroot"
        (made / "include" / "sys").mkdir(parents=True)
        for name, text in HEADERS.items():
            (made / "include" / name).write_text(text, encoding="utf-8")
        (made / "lib").mkdir()
        stubs = _stubs(Path(scratch), glibc)
        for name in (*LIBRARIES, LOADER):
            shutil.copy(stubs / name, made / "lib" / name)
        # What `-lc` and the like look for. As in the real one, libc.so brings along the loader's
        # __tls_get_addr and a handful of functions such as atexit, which are linked statically
        # (the system's own: they only call what every glibc has).
        for name in LIBRARIES:
            script = f"GROUP ( {name} libc_nonshared.a AS_NEEDED ( {LOADER} ) )\n"
            (made / "lib" / f"{name.partition('.')[0]}.so").write_text(script, encoding="utf-8")
        (made / f"glibc-{glibc}").touch()
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)
    return folder


def _stubs(scratch: Path, glibc: str) -> Path:
    """The folder in zig's cache with the stubs: it makes them to link any program."""
    program = scratch / "empty.c"
    program.write_text("int main(void) { return 0; }\n", encoding="utf-8")
    cache = scratch / "cache"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ziglang", "cc"),
            *("-target", f"{platform.machine()}-linux-gnu.{glibc}"),
            *(str(program), "-o", str(scratch / "empty")),
        ],
        env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted(cache.glob("o/*/libc.so.6"))
    if done.returncode != 0 or len(found) != 1:
        said = (done.stderr.strip().splitlines() or ["it left no libc.so.6"])[-1]
        raise StubError(f"ziglang made no stubs of glibc {glibc}: {said}; pip install ziglang")
    return found[0].parent


def main() -> int:
    """Command line: the folder to make."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    try:
        print(make_sysroot(parser.parse_args().folder))
    except StubError as error:
        print(f"mmfast: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
