"""The CUDA kernels executed on the CPU: the host library, the backend `cuda` on it, checked cases.

`tools/host_build.py` compiles csrc/cuda against csrc/host into one library for each mode: plain
(-O2, seeded random schedules), asan, tsan. Its ops are `torch.ops.mmfast_host.*`, for CPU tensors.
Within `host_backend()` the backend "cuda" is these ops, with everything that is around it for GPUs:
dispatch, checks, autograd, vmap, torch.compile. New memory is NaN there, so that an element that a
kernel never writes shows.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import mmfast
from mmfast import _torch_ops, dispatch
from mmfast.testing import tolerance
from mmfast.testing.cases import CROSS_ATTENTION, functional_cases, make_inputs
from mmfast.testing.gate_cases import GATES, functional_gate_cases, make_gate_inputs
from mmfast.testing.gate_tolerance import assert_gate_accurate, gate_truth, run_gate

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = "mmfast_host"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256

MODE = os.environ.get("MMFAST_HOST_MODE", "plain")
"""Which library this process loads: under a sanitizer's runtime that of its mode."""


# --- the library --------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The host library of `MODE`, built where it is not there, and its ops in torch.

    Skips the test, with a reason, where nothing can be compiled.
    """
    if str(ROOT / "tools") not in sys.path:
        sys.path.insert(0, str(ROOT / "tools"))
    import host_build
    import native_build

    try:
        path = host_build.build(MODE)
    except native_build.MissingToolError as missing:
        pytest.skip(str(missing))
    torch.ops.load_library(str(path))
    handle = ctypes.CDLL(str(path))
    handle.mmfast_host_counters.restype = ctypes.c_char_p
    handle.mmfast_host_launches.restype = ctypes.c_char_p
    handle.mmfast_host_seed.argtypes = [ctypes.c_uint64]
    return handle


def has_compiler() -> bool:
    """Whether the library can be built at all, for marks of files that need nothing else."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def ops(namespace: str = NAMESPACE) -> tuple[str, ...]:
    """The ops that the library has whole."""
    library()
    return tuple(op for op in _torch_ops.OPS if _torch_ops.has_ops(op, namespace))


def asked_for_some() -> bool:
    """Whether MMFAST_HOST_OPS left ops out of the library, while they are worked on."""
    return bool(os.environ.get("MMFAST_HOST_OPS"))


def op(name: str) -> Any:
    """`torch.ops.mmfast_host.<name>`: "glu_fwd"."""
    library()
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def seed(number: int) -> None:
    """The order in which warps and lanes take turns in the launches that follow."""
    library().mmfast_host_seed(number)


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """The names of the kernels that `call` launches, with their template arguments."""
    library().mmfast_host_clear_counters()
    call()
    return [one["kernel"] for one in json.loads(library().mmfast_host_launches())]


@contextmanager
def device(multiprocessors: int, shared_kib: int = 99) -> Iterator[None]:
    """A device of so many multiprocessors, and so much shared memory for a block: what launchers
    choose tiles and splits by. 99 KiB are what the smallest GPU has."""
    library().mmfast_host_device(multiprocessors, 80, shared_kib * 1024)
    try:
        yield
    finally:
        library().mmfast_host_device(108, 80, 163 * 1024)


def counters() -> dict[str, Any]:
    """What the launches since `clear_counters` did, by kernel."""
    return json.loads(library().mmfast_host_counters())


# --- the backend --------------------------------------------------------------------------------


@contextmanager
def _patched(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextmanager
def host_backend(namespace: str = NAMESPACE) -> Iterator[None]:
    """Every op runs on the backend "cuda", which is the host library, on CPU tensors.

    `namespace` is that of another library of `host_build.build(name=...)`, loaded already.
    """
    found = ops(namespace)
    key = torch._C.DispatchKey.CPU
    _torch_ops.note_defined(found, namespace)
    kernels = {one: _torch_ops.compiled(one, namespace, key) for one in found}
    home = dispatch.Home(namespace, key, "cpu")
    with (
        _patched(dispatch, _cuda_home=home, _cuda_kernels=kernels, _cuda_missing=None),
        mmfast.use_backend("cuda"),
    ):
        yield


@pytest.fixture
def host() -> Iterator[None]:
    """`host_backend()` for one test."""
    with host_backend():
        yield


# --- the registry's cases -------------------------------------------------------------------------


def _in_turns(names: list[str]) -> list[Any]:
    """Every case in one dtype, in turns, and in the others as slow tests."""
    cases = []
    for number, name in enumerate(names):
        for place, dtype in enumerate(DTYPES):
            marks = [] if number % len(DTYPES) == place else [pytest.mark.slow]
            label = str(dtype).removeprefix("torch.")
            cases.append(pytest.param(name, dtype, id=f"{name}-{label}", marks=marks))
    return cases


def attention_cases() -> list[Any]:
    """`(name, dtype)` of every functional case that a GPU kernel takes."""
    return _in_turns([c.name for c in functional_cases() if max(c.D, c.Dv) <= WIDEST])


def gate_cases(*ops: str) -> list[Any]:
    """`(name, dtype)` of every functional case of these ops."""
    return _in_turns([name for op in ops for name in functional_gate_cases(op)])


def check_attention(name: str, dtype: torch.dtype) -> tolerance.Results:
    """A case through the public function, forward and backward, by the ruler.

    NaN is in everything that takes no part, and no input is written to. NaN need copies, which lie
    in memory in one way: cases of layouts go without. Call it within `host_backend()`.
    """
    inputs = make_inputs(CROSS_ATTENTION[name], dtype)
    against = tolerance.truth(inputs)
    taken = inputs if "layout" in name or inputs.case.layout != "bhnd" else inputs.poisoned()
    tensors = {"q": taken.q, "k": taken.k, "v": taken.v, **taken.options}
    with _untouched(tensors):
        seed(zlib.crc32(name.encode()))
        results = tolerance.run(mmfast.cross_attention, taken)
    tolerance.assert_accurate(results, against)
    return results


def check_gate(name: str, dtype: torch.dtype) -> tolerance.Results:
    """The same of a case of a gate."""
    case = GATES[name]
    inputs = make_gate_inputs(case, dtype)
    against = gate_truth(inputs)
    taken = inputs if case.layout != "dense" else inputs.poisoned()
    with _untouched({**taken.leaves, **taken.options, **taken.incoming}):
        seed(zlib.crc32(name.encode()))
        results = run_gate(getattr(mmfast, case.op), taken)
    assert_gate_accurate(results, against)
    return results


@contextmanager
def _untouched(tensors: dict[str, Any]) -> Iterator[None]:
    before = {n: t.clone() for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    yield
    for name, kept in before.items():
        assert torch.equal(tensors[name].nan_to_num(777.0), kept.nan_to_num(777.0)), (
            f"{name} was written"
        )
