"""Launching a Triton kernel that is compiled already, at a fraction of what Triton takes for it.

`kernel[grid](...)` binds every argument, asks how each is specialised, and makes texts of that to
find the compiled kernel: 10 to 30 microseconds for these kernels, longer than many of them run. The
compiled kernel that it returned is kept here, under a key that takes a few. Launches of one key are
one kernel to Triton, since the key holds the type of every argument, and of

    a tensor        dtype; whether its address is a multiple of 16; what a backend adds (AMD)
    an int          how many bits it needs, where it is not specialised
    a tuple of ints their values: Triton specialises those always, on 1 and on multiples of 16
    other tuples, descriptors, ints that are specialised: what Triton goes by, one by one
    a constant or an option: name and value

and of a float or a bool nothing else. So a new shape asks Triton only where ints are in tuples.
Triton itself launches where it knows more: for other types, while kernels are debugged or
instrumented, and in releases whose rules were not compared with these (`FIRST`, `LAST`;
tests/test_triton_launch.py compares). Nothing here waits for the device or allocates on it. The
tables may be used by several threads: at worst two of them ask Triton the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

FIRST, LAST = (3, 6), (3, 9)
MOST = 4096  # entries of a table that shapes fill; then it starts anew


class _Ready(NamedTuple):
    """A compiled kernel, and the values of the parameters that follow the positional arguments."""

    kernel: CompiledKernel
    run: Callable[..., None]
    function: Any
    packed: Any
    rest: tuple[Any, ...]


class _Plan:
    """How to take arguments of given types apart. It stands for these types in a key.

    plain: positions of tuples that hold nothing but ints. They are taken by value, so what is an
    int in them has to be one in every launch, not an equal float. deep: of what is described part
    by part; `deep` given: tuples that stay there.
    """

    __slots__ = (
        "by_name", "deep", "ints", "listed", "plain", "rare", "rest", "tensors", "types", "values",
    )  # fmt: skip

    def __init__(
        self,
        known: _Known,
        types: tuple[type, ...],
        args: tuple[Any, ...],
        deep: Sequence[int] = (),
    ) -> None:
        self.types = types
        self.listed = known.usual
        self.deep: list[int] = []
        self.plain: list[int] = []
        tensors, ints, constants = [], [], []
        for i, (arg, parameter) in enumerate(zip(args, known.kernel.params)):
            if parameter.is_constexpr:
                constants.append(i)
            elif isinstance(arg, Tensor):
                tensors.append(i)
            elif type(arg) is int and parameter.do_not_specialize:
                ints.append(i)
            elif isinstance(arg, tuple) and i not in deep and _is_integers(arg):
                self.plain.append(i)
            elif isinstance(arg, tuple) or type(arg) in (int, TensorDescriptor):
                self.deep.append(i)
            elif arg is not None and type(arg) not in (bool, float):
                self.listed = False
        self.tensors = _picker(tensors)
        self.ints = _picker(ints)
        self.values = _picker(constants + self.plain)
        self.rare = bool(self.deep) or known.own is not None
        rest = known.kernel.params[len(args) :]
        self.rest = [(parameter.name, parameter.default) for parameter in rest]
        self.by_name = {parameter.name for parameter in rest if not parameter.is_constexpr}


class _Known:
    """A kernel, and what was compiled of it."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel  # lives on, so that no other has its id
        backend = type(make_backend(driver.active.get_current_target()))
        own = backend.get_tensor_specialization
        self.own = None if own is BaseBackend.get_tensor_specialization else own
        self.usual = backend.get_int_specialization is BaseBackend.get_int_specialization
        self.plan = _Plan(self, (), ())  # the last one
        self.plans: dict[tuple[type, ...], _Plan] = {}
        self.ready: dict[tuple[Any, ...], _Ready] = {}

    def plan_for(self, types: tuple[type, ...], args: tuple[Any, ...]) -> _Plan:
        """The plan for these types, which is the last one now."""
        plan = self.plans.get(types)
        if plan is None:
            plan = self.plans[types] = _Plan(self, types, args)
        self.plan = plan
        return plan

    def rarely(self, plan: _Plan, args: tuple[Any, ...]) -> list[Any]:
        """What else is in a key where tensors are not aligned, or the plan asks for it."""
        parts = [_address(tensor, self.own) for tensor in plan.tensors(args)]
        return parts + [_described(args[i], self.own) for i in plan.deep]

    def wide(self, ints: tuple[int, ...]) -> list[tuple[str, ...]]:
        """What else is in a key where ints take more than 32 bits."""
        kinds = tuple(map(_bits, ints))
        return [kinds] if kinds.count("i32") < len(kinds) else []

    def keep(
        self,
        plan: _Plan,
        key: tuple[Any, ...],
        made: Any,
        args: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:
        """From now on, launch for this key what Triton made for it.

        Not where a run-time argument is among the constants, whose value would be in the key; nor
        where a tuple held only ints when the plan was made and now holds more. And Triton has made
        nothing where a hook prevented it.
        """
        by_name = not plan.by_name.isdisjoint(constants)
        if by_name or not plan.listed or not isinstance(made, CompiledKernel):
            return
        if not all(_is_integers(args[i]) for i in plan.plain):
            self.plan = self.plans[plan.types] = _Plan(self, plan.types, args, plan.deep)
            return
        if len(self.ready) >= MOST:
            self.ready.clear()
        rest = tuple([constants.get(name, default) for name, default in plan.rest])
        self.ready[key] = _Ready(made, made.run, made.function, made.packed_metadata, rest)


_kernels: dict[int, _Known] = {}


def forget() -> None:
    """Empty the tables: for tests, which change Triton's driver."""
    _kernels.clear()


def _why_not() -> str | None:
    """Why Triton itself does every launch; None where it does not."""
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not FIRST <= release <= LAST:
        return f"triton {triton.__version__} may specialise in ways that were not compared"
    wanted: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (knobs.runtime, ("launch_enter_hook", "launch_exit_hook", "add_stages_inspection_hook")),
        (knobs.runtime, ("debug",)),
        (knobs.compilation, ("instrumentation_mode",)),
        (CompiledKernel, ("run", "launch_metadata")),
        (BaseBackend, ("get_tensor_specialization", "get_int_specialization")),
    )
    missing = [name for owner, names in wanted for name in names if not hasattr(owner, name)]
    return f"triton {triton.__version__} has no {', '.join(missing)}" if missing else None


WHY_NOT = _why_not()


def run(kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """`kernel[(programs,)](*args, **constants)` on the device of the first argument, a tensor."""
    known = _kernels.get(id(kernel))
    runtime = knobs.runtime
    if (
        known is None
        or runtime.debug
        or runtime.add_stages_inspection_hook is not None
        or knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
    ):
        _run_otherwise(kernel, programs, args, constants)
        return
    active = driver.active
    device = active.get_current_device()
    there = args[0].get_device()
    if there != device and there >= 0:  # -1 is a CPU: Triton's launcher says what is wrong
        with torch.cuda.device(there):
            run(kernel, programs, args, constants)
        return
    types = tuple(map(type, args))
    plan = known.plan
    if plan.types != types:
        plan = known.plan_for(types, args)
    parts = [plan, device, plan.values(args), *constants, *constants.values()]
    low = bits = 0
    for tensor in plan.tensors(args):
        parts.append(tensor.dtype)
        low |= tensor.data_ptr()
    for value in plan.ints(args):
        bits |= value
    if bits >> 31:  # one is negative, or takes more than 31 bits
        parts += known.wide(plan.ints(args))
    if low & 15 or plan.rare:
        parts += known.rarely(plan, args)
    key = tuple(parts)
    ready = known.ready.get(key)
    if ready is None:
        made = kernel[(programs,)](*args, **constants)
        known.keep(plan, key, made, args, constants)
        return
    compiled, call, function, packed, rest = ready
    stream = active.get_current_stream(device)
    entered, left = runtime.launch_enter_hook, runtime.launch_exit_hook
    told = None
    # A chain of hooks that has no calls is left out. What is no chain is a hook, or None.
    if getattr(entered, "calls", True) or getattr(left, "calls", True):
        told = compiled.launch_metadata((programs,), stream, *args, *rest)
    else:
        entered = left = None
    call(programs, 1, 1, stream, function, packed, told, entered, left, *args, *rest)


def _run_otherwise(
    kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """The first launch of a kernel, and those that Triton does."""
    if id(kernel) not in _kernels and WHY_NOT is None and type(kernel) is JITFunction:
        _kernels[id(kernel)] = _Known(kernel)
        run(kernel, programs, args, constants)
        return
    there = args[0].get_device()
    if there >= 0 and there != torch.cuda.current_device():
        with torch.cuda.device(there):
            kernel[(programs,)](*args, **constants)
    else:
        kernel[(programs,)](*args, **constants)


def _is_integers(values: tuple[Any, ...]) -> bool:
    """Whether a tuple holds ints, and tuples of such, and nothing else."""
    for value in values:
        if type(value) is not int and not (isinstance(value, tuple) and _is_integers(value)):
            return False
    return True


def _picker(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """What is at these places, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda args: tuple([args[i] for i in places])


def _described(value: Any, own: Callable[..., str] | None) -> Any:
    """What Triton specialises a kernel on for this argument."""
    kind = type(value)
    if value is None or kind is bool or kind is float:
        return kind
    if kind is int:
        return "1" if value == 1 else _bits(value) + ("" if value & 15 else "D")
    if isinstance(value, Tensor):
        return value.dtype, _address(value, own)
    if isinstance(value, tuple):
        return (kind, *[_described(part, own) for part in value])
    if kind is TensorDescriptor:
        return kind, value.base.dtype, tuple(value.block_shape)
    return object()  # a type that is not listed: equal to nothing, so Triton launches


def _address(tensor: Tensor, own: Callable[..., str] | None) -> Any:
    """What is specialised of a tensor besides its dtype."""
    return own(tensor, align=True) if own is not None else tensor.data_ptr() & 15 == 0


def _bits(value: int) -> str:
    """The type that an int gets."""
    if -(2**31) <= value < 2**31:
        return "i32"
    return "i64" if -(2**63) <= value < 2**63 else "u64"
