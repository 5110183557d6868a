"""Triton kernels on machines without a GPU: the interpreter, and a guard over its memory accesses.

`with interpreter() as kernels:` gives the package `mmfast.kernels` imported for Triton's
interpreter, which runs kernels on CPU tensors. Every load and store of a launch is checked: an
address that is no element of a tensor passed to that launch is an `OutOfBoundsError`; two programs
writing one address, or one writing what another reads, is a `RaceError`; so is a floating-point
atomic, whose order is the scheduler's. Results of `torch.empty` hold NaN, so an element that is
never written shows. bfloat16 is right in the interpreter with `triton_numerics.py` alone; here
numerics are tested in float32 and float16.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import dispatch
from mmfast.testing.gate_cases import GATES, functional_gate_cases, make_gate_inputs
from mmfast.testing.gate_tolerance import assert_gate_accurate, gate_truth, run_gate

HAS_TRITON = importlib.util.find_spec("triton") is not None
requires_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

_PACKAGE = "mmfast.kernels"
_interpreted: dict[str, ModuleType] = {}


class OutOfBoundsError(IndexError):
    """A kernel touched memory that no tensor of its launch holds."""


class RaceError(RuntimeError):
    """The result depends on the order in which programs run."""


# --- the guard ------------------------------------------------------------------------------------


def _element_addresses(tensor: Tensor) -> np.ndarray:
    """The address of every element of `tensor`, in no particular order."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride != 0:
            offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
        elif size == 0:
            offsets = offsets[:0]
    return (tensor.data_ptr() + offsets * tensor.element_size()).astype(np.uint64)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(getattr(value, "base", None), Tensor):  # a tensor descriptor
        yield value.base


class Guard:
    """The memory that one launch may touch, and which program touched what."""

    def __init__(self, kernel: str, arguments: tuple[Any, ...]) -> None:
        self.kernel = kernel
        tensors = [tensor for tensor in _tensors(arguments) if tensor.numel()]
        addresses = [_element_addresses(tensor) for tensor in tensors]
        sizes = [
            np.full(len(a), t.element_size(), np.int64)
            for a, t in zip(addresses, tensors, strict=True)
        ]
        joined = np.concatenate(addresses) if addresses else np.zeros(0, np.uint64)
        self.addresses, first = np.unique(joined, return_index=True)
        self.sizes = np.concatenate(sizes)[first] if sizes else np.zeros(0, np.int64)
        self.writer = np.full(len(self.addresses), -1, np.int64)
        self.reader = np.full(len(self.addresses), -1, np.int64)
        self.shared = np.zeros(len(self.addresses), bool)  # read by more than one program
        self.program = 0

    def _find(self, access: str, pointers: Any, mask: Any) -> np.ndarray:
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(
            pointers.data.shape, mask.data.shape))  # fmt: skip
        touched = addresses[np.broadcast_to(mask.data, addresses.shape)].ravel().astype(np.uint64)
        index = np.searchsorted(self.addresses, touched)
        if len(self.addresses) == 0:
            inside = np.zeros(len(touched), bool)
        else:
            clipped = np.minimum(index, len(self.addresses) - 1)
            itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            inside = (self.addresses[clipped] == touched) & (self.sizes[clipped] == itemsize)
        if not inside.all():
            count = int((~inside).sum())
            raise OutOfBoundsError(
                f"{self.kernel}, program {self.program}: {access} of {count} elements outside of "
                f"the tensors that were passed"
            )
        return index

    def load(self, pointers: Any, mask: Any) -> None:
        index = self._find("load", pointers, mask)
        self._race(index, (self.writer[index] >= 0) & (self.writer[index] != self.program), "read")
        self.shared[index] |= (self.reader[index] >= 0) & (self.reader[index] != self.program)
        self.reader[index] = self.program

    def store(self, pointers: Any, mask: Any) -> None:
        index = self._find("store", pointers, mask)
        if len(np.unique(index)) != len(index):
            raise RaceError(f"{self.kernel}: one store writes an address twice")
        written = (self.writer[index] >= 0) & (self.writer[index] != self.program)
        self._race(index, written, "written")
        read = (self.reader[index] >= 0) & (self.reader[index] != self.program)
        self._race(index, read | self.shared[index], "written after another read it")
        self.writer[index] = self.program

    def _race(self, index: np.ndarray, found: np.ndarray, what: str) -> None:
        if found.any():
            raise RaceError(
                f"{self.kernel}: {int(found.sum())} of {len(index)} elements that another program "
                f"touched are {what} by program {self.program}"
            )


_current: list[Guard] = []


@contextmanager
def _patched(target: Any, **replacements: Any) -> Iterator[None]:
    before = {name: getattr(target, name) for name in replacements}
    try:
        for name, value in replacements.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


@contextmanager
def _guarded() -> Iterator[None]:
    from triton.runtime import interpreter as runtime

    builder, executor = runtime.InterpreterBuilder, runtime.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, set_index, call = builder.create_atomic_rmw, builder.set_grid_idx, executor.__call__

    def guarded_load(self: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        _current[-1].load(pointers, mask)
        return load(self, pointers, mask, *rest, **more)

    def guarded_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _current[-1].store(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def refused_rmw(self: Any, op: Any, pointers: Any, value: Any, *rest: Any) -> Any:
        if np.issubdtype(value.data.dtype, np.floating):
            raise RaceError("a floating-point atomic: its result depends on the order of programs")
        return rmw(self, op, pointers, value, *rest)

    def numbered(self: Any, x: int, y: int, z: int) -> None:
        set_index(self, x, y, z)
        _current[-1].program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z

    def with_guard(self: Any, *args: Any, **kwargs: Any) -> Any:
        _current.append(Guard(self.fn.__name__, (*args, *kwargs.values())))
        try:
            return call(self, *args, **kwargs)
        except Exception as error:
            raise _cause(error) from error
        finally:
            _current.pop()

    with (
        _patched(builder, create_masked_load=guarded_load, create_masked_store=guarded_store),
        _patched(builder, create_atomic_rmw=refused_rmw, set_grid_idx=numbered),
        _patched(executor, __call__=with_guard),
    ):
        yield


def _cause(error: BaseException) -> BaseException:
    """The guard's own error, which the interpreter wraps once for each call level."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OutOfBoundsError | RaceError):
            return inner
        inner = inner.__cause__
    return error


# --- the interpreter in this process --------------------------------------------------------------


@contextmanager
def _interpreted_language() -> Iterator[None]:
    """Triton's own jit functions (tl.sum, tl.cdiv ...) as the interpreter calls them.

    Triton decides when it is imported, and another test may have imported it for the compiler.
    """
    import triton.language as tl
    from triton.runtime import interpreter as runtime
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    replaced: dict[int, InterpretedFunction] = {}
    before: list[tuple[Any, str, Any]] = []
    for module in (tl, tl.standard, tl.math, tl.random, tl.core.tensor):
        for name, value in vars(module).copy().items():
            if isinstance(value, JITFunction):
                before.append((module, name, value))
                if id(value) not in replaced:
                    replaced[id(value)] = InterpretedFunction(value.fn)
    for module, name, value in before:
        setattr(module, name, replaced[id(value)])
    # The interpreter patches the language at every call of a jit function, which is most of its
    # time, and leaves what nested calls patched. Once here instead, and undone.
    everything = FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    scope = runtime._patch_lang(everything)
    try:
        with _patched(runtime, _patch_lang=lambda function: runtime._LangPatchScope()):
            yield
    finally:
        scope.restore()
        for module, name, value in before:
            setattr(module, name, value)


def _modules() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == _PACKAGE or name.startswith(_PACKAGE + ".")]
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def interpreter() -> Iterator[ModuleType]:
    """`mmfast.kernels` for the interpreter, under the guard; everything is as before at the end.

    Within it TRITON_INTERPRET is 1 and `import mmfast.kernels...` gives the interpreted modules,
    which are the same objects every time.
    """
    import triton  # noqa: F401  before the variable is set: for the compiler

    variable = os.environ.get("TRITON_INTERPRET")
    compiled, attribute = _modules(), mmfast.__dict__.get("kernels")
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ["TRITON_INTERPRET"] = "1"
    sys.modules.update(_interpreted)
    if _PACKAGE in _interpreted:
        mmfast.__dict__["kernels"] = _interpreted[_PACKAGE]
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
        known = _patched(dispatch, _triton_kernels=None, _triton_missing=None)
        with known, _guarded(), _interpreted_language(), np.errstate(all="ignore"):
            yield importlib.import_module(_PACKAGE)
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _interpreted.update(_modules())
        sys.modules.update(compiled)
        mmfast.__dict__.pop("kernels", None)
        if attribute is not None:
            mmfast.__dict__["kernels"] = attribute
        if variable is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = variable


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """`mmfast.kernels` for the interpreter under the guard, for all tests of a module."""
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    with interpreter() as kernels:
        yield kernels


# --- the registry's cases -------------------------------------------------------------------------


def triton_cases(*ops: str) -> list[Any]:
    """Every case of `ops` in float32; in float16 every third, and the others as slow tests."""
    cases = []
    for number, name in enumerate(case for op in ops for case in functional_gate_cases(op)):
        cases.append(pytest.param(name, torch.float32, id=f"{name}-float32"))
        marks = [pytest.mark.slow] if number % 3 else []
        cases.append(pytest.param(name, torch.float16, id=f"{name}-float16", marks=marks))
    return cases


def check_case(name: str, dtype: torch.dtype) -> None:
    """A case through the public function on the Triton backend, forward and backward.

    Judged by the project's ruler, with NaN in everything that is masked, and with every input
    untouched afterwards. Call it within `interpreter()`.
    """
    case = GATES[name]
    inputs = make_gate_inputs(case, dtype)
    against = gate_truth(inputs)
    poisoned = inputs.poisoned()
    before = {k: leaf.clone() for k, leaf in poisoned.leaves.items()}
    with mmfast.use_backend("triton"):
        results = run_gate(getattr(mmfast, case.op), poisoned)
    for k, leaf in poisoned.leaves.items():
        assert torch.equal(leaf.nan_to_num(777.0), before[k].nan_to_num(777.0)), f"{k} was written"
    assert_gate_accurate(results, against)
