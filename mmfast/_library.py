"""The compiled library `mmfast/_C.so`: loaded on first use, or one sentence why it is not.

Only dispatch.py, `python -m mmfast info` and tests import this module. Importing it loads nothing;
`status()` does, once. The path is fixed beside the package: no environment variable names code.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from mmfast._version import __version__

ISA_NAMES = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
"""Every instruction-set name of every platform, weakest first: the values of MMFAST_ISA."""

HOW_TO_GET_IT = (
    "install a C++ compiler (g++ 11 or newer) and run "
    "`MMFAST_BUILD=on pip install --no-build-isolation .` in a checkout"
)
HOW_TO_GET_CUDA = (
    "install the wheel that has them, or a CUDA toolkit of the major version of torch's and run "
    "`MMFAST_BUILD=on MMFAST_CUDA=on pip install --no-build-isolation .` in a checkout"
)
_ENTRY_POINTS = (
    "mmfast_isa_available",
    "mmfast_isa_current",
    "mmfast_isa_set",
    "mmfast_build_info",
    "mmfast_cuda_streams",
)
_lock = threading.RLock()


class LibraryStatus(NamedTuple):
    """Whether the library is in use. `reason` says in one sentence why not, otherwise None."""

    loaded: bool
    path: str | None
    reason: str | None


class _State(NamedTuple):
    status: LibraryStatus
    handle: ctypes.CDLL | None


def status() -> LibraryStatus:
    """Loads the library at the first call and reports. Never raises.

    A library that is there and cannot be used is also a RuntimeWarning, once.
    """
    return _state().status


def isa_available() -> tuple[str, ...]:
    """The instruction sets this processor can run, weakest first; () without the library."""
    handle = _state().handle
    return tuple(_text(handle.mmfast_isa_available()).split(",")) if handle else ()


def isa_current() -> str | None:
    """The instruction set in use, or None without the library."""
    handle = _state().handle
    return _text(handle.mmfast_isa_current()) if handle else None


def set_isa(name: str) -> None:
    """Uses the instruction set `name` from now on in the whole process; "auto" is the best one.

    Raises ValueError for a name that does not exist or that this processor cannot run, and
    RuntimeError when the library is not loaded.
    """
    state = _state()
    if state.handle is None:
        raise RuntimeError(f"set_isa: {state.status.reason}")
    code = state.handle.mmfast_isa_set(name.encode())
    if code == 1:
        known = ", ".join(("auto", *ISA_NAMES))
        raise ValueError(f"set_isa: {name!r} is not an instruction set; use one of {known}")
    if code != 0:
        able = ", ".join(isa_available())
        raise ValueError(f"set_isa: this processor cannot run {name}; use one of {able}")


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """`with use_isa("avx2"):` and back to the former instruction set afterwards.

    Process-wide, like `set_isa`: meant for tests and benchmarks, not for concurrent threads.
    """
    before = isa_current()
    set_isa(name)
    try:
        yield
    finally:
        set_isa(before or "auto")


def build_info() -> dict[str, Any]:
    """What the library says of itself: version, compiler, torch target, instruction sets."""
    handle = _state().handle
    return json.loads(_text(handle.mmfast_build_info())) if handle else {}


# --- the CUDA kernels in it -------------------------------------------------------------------


def cuda_code() -> tuple[str, str]:
    """The architectures that the library has machine code for and those it has PTX for.

    Both as they were asked for at the build, "80,90,100f"; empty without CUDA kernels.
    """
    info = build_info()
    return str(info.get("cuda_archs") or ""), str(info.get("cuda_ptx") or "")


def has_cuda_streams() -> bool:
    """Whether the torch of this process has the CUDA streams that the kernels are launched on."""
    handle = _state().handle
    return handle is not None and handle.mmfast_cuda_streams() == 1


def no_code_for(capability: tuple[int, int]) -> str | None:
    """Why the library's CUDA kernels cannot run on a GPU of this compute capability.

    Machine code of X.Y runs on X.Z with Z >= Y ("100f" is a family of that kind, "90a" runs on 9.0
    alone), PTX on everything from its own version on.
    """
    codes, ptx = cuda_code()
    major, minor = capability
    for name in filter(None, codes.split(",")):
        has_major, has_minor, exact = _architecture(name)
        if has_major == major and (has_minor == minor if exact else has_minor <= minor):
            return None
    for name in filter(None, ptx.split(",")):
        has_major, has_minor, exact = _architecture(name)
        if (has_major, has_minor) == capability:
            return None
        if not exact and (has_major, has_minor) < capability:
            return None
    return (
        f"the compiled library has CUDA kernels for {codes or 'no architecture'} (PTX for "
        f"{ptx or 'none'}), this GPU is {major}.{minor}; {HOW_TO_GET_CUDA}"
    )


def _architecture(name: str) -> tuple[int, int, bool]:
    """ "90a" -> (9, 0, True): major, minor, whether it is for that version alone."""
    number = int(name.rstrip("af"))
    return number // 10, number % 10, name.endswith("a")


@functools.lru_cache(maxsize=1)
def _loaded() -> _State:
    # Not .resolve(): a tree of links (tools/sanitize.py) brings a library of its own.
    path = Path(__file__).parent / "_C.so"
    if not path.exists():
        reason = f"the compiled library is not in this installation; {HOW_TO_GET_IT}"
        return _State(LibraryStatus(False, None, reason), None)
    try:
        handle = _open(path)
        _apply_environment(handle)
    except _NotUsableError as error:
        # Falling back without a word would only show as slowness.
        warnings.warn(f"mmfast: {error}", RuntimeWarning, stacklevel=2)
        return _State(LibraryStatus(False, str(path), str(error)), None)
    return _State(LibraryStatus(True, str(path), None), handle)


def _state() -> _State:
    with _lock:
        return _loaded()


class _NotUsableError(Exception):
    """Why a library file that exists is not used."""


def _open(path: Path) -> ctypes.CDLL:
    """Loads and checks the file. Raises _NotUsableError with one sentence."""
    if not _is_complete(path):
        raise _NotUsableError(
            f"the compiled library is damaged (no complete ELF file); {HOW_TO_GET_IT}"
        )
    torch_version = torch.__version__
    try:
        torch.ops.load_library(str(path))
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise _NotUsableError(_explain(error.__cause__ or error, torch_version)) from error
    missing = [name for name in _ENTRY_POINTS if not hasattr(handle, name)]
    if missing:
        raise _NotUsableError(
            f"the compiled library lacks {', '.join(missing)}, so it is not of mmfast "
            f"{__version__}; to rebuild it, {HOW_TO_GET_IT}"
        )
    handle.mmfast_isa_available.restype = ctypes.c_char_p
    handle.mmfast_isa_current.restype = ctypes.c_char_p
    handle.mmfast_build_info.restype = ctypes.c_char_p
    handle.mmfast_isa_set.argtypes = [ctypes.c_char_p]
    handle.mmfast_isa_set.restype = ctypes.c_int
    handle.mmfast_cuda_streams.restype = ctypes.c_int
    built = json.loads(_text(handle.mmfast_build_info())).get("version")
    if built != __version__:
        raise _NotUsableError(
            f"the compiled library is of mmfast {built} but the package is {__version__}; "
            f"to rebuild it, {HOW_TO_GET_IT}"
        )
    return handle


def _explain(error: BaseException, torch_version: str) -> str:
    """One sentence for what the dynamic linker said."""
    said = " ".join(str(error).split())
    symbol = re.search(r"undefined symbol: (\S+)", said)
    if symbol:
        return (
            f"the compiled library does not fit torch {torch_version} (it needs the symbol "
            f"{symbol.group(1)}); install torch 2.10 or newer, or {HOW_TO_GET_IT}"
        )
    return f"the compiled library is damaged or of another system ({said}); {HOW_TO_GET_IT}"


def _is_complete(path: Path) -> bool:
    """Whether the file is ELF and as long as its header says.

    The linker maps a truncated file without complaint and the process dies of SIGBUS. The section
    header table is the last thing in the file: offset at byte 40, entry size and count at 58.
    """
    with path.open("rb") as file:
        header = file.read(64)
        length = file.seek(0, os.SEEK_END)
    if len(header) < 64 or not header.startswith(b"\x7fELF"):
        return False
    order: Literal["little", "big"] = "little" if header[5] == 1 else "big"
    offset = int.from_bytes(header[40:48], order)
    size, count = (int.from_bytes(header[at : at + 2], order) for at in (58, 60))
    return length >= offset + size * count


def _apply_environment(handle: ctypes.CDLL) -> None:
    """MMFAST_ISA caps the instruction set: the best available one that is not above it."""
    cap = os.environ.get("MMFAST_ISA", "")
    if not cap:
        return
    if cap not in ISA_NAMES:
        raise _NotUsableError(
            f"MMFAST_ISA={cap} is not an instruction set; use one of {', '.join(ISA_NAMES)}, "
            "or unset it"
        )
    allowed = ISA_NAMES[: ISA_NAMES.index(cap) + 1]
    available = _text(handle.mmfast_isa_available()).split(",")
    best = [name for name in allowed if name in available][-1]
    handle.mmfast_isa_set(best.encode())


def _text(value: bytes | None) -> str:
    return (value or b"").decode()
