"""Launches of compiled kernels: they are the ones that Triton would make, and cheaper.

No GPU: Triton's driver is `stub_gpu`, which records launches. Where the code of a kernel does not
matter, nothing is compiled either: a kernel is then a handle, one for each that Triton tells apart.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_helpers import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import launch_overhead
import triton
import triton.language as tl
from mmfast.kernels import _compiled, _launch
from stub_gpu import H100, StubGpu, stub_gpu
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

if _compiled.WHY_NOT is not None:
    pytest.skip(_compiled.WHY_NOT, allow_module_level=True)

MI300 = GPUTarget("hip", "gfx942", 64)


@triton.jit(do_not_specialize=["n"])
def any_kernel(first, n, m, x, y, strides, more, K: tl.constexpr, LAST: tl.constexpr = 7):
    pass


class Some(NamedTuple):
    tensor: Any
    value: Any
    inner: Any


class Other(NamedTuple):
    tensor: Any
    value: Any
    inner: Any


@contextmanager
def uncompiled(target: GPUTarget = H100) -> Iterator[StubGpu]:
    """The stub; Triton makes a new handle wherever it would compile."""
    handles = itertools.count(1)

    def do_compile(
        self: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, *rest: Any
    ) -> Any:
        made = _compiled.CompiledKernel.__new__(_compiled.CompiledKernel)
        made.name, made.src, made.packed_metadata = self.__name__, None, options
        made.module, made._module_pid, made.metadata_group, made.hash = 0, None, {}, ""
        made.function = next(handles)
        made._run = gpu.launcher_cls(None, None)
        self.device_caches[device][0][key] = made
        return made

    with pytest.MonkeyPatch.context() as patch, stub_gpu(target) as gpu:
        patch.setattr(JITFunction, "_do_compile", do_compile)
        any_kernel.device_caches.clear()
        _compiled.forget()
        yield gpu
        _compiled.forget()
        any_kernel.device_caches.clear()


@pytest.fixture
def gpu() -> Iterator[StubGpu]:
    with uncompiled() as gpu:
        yield gpu


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of every launch that Triton did."""
    calls: list[Any] = []
    run = JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return calls


# --- the same kernel ------------------------------------------------------------------------------

BUFFER = torch.empty(256, dtype=torch.uint8)
assert BUFFER.data_ptr() % 16 == 0
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8)
HUGE = torch.empty(2**31, dtype=torch.uint8)  # never touched: AMD asks how large a storage is
VALUES = (0, 1, 2, 15, 16, 17, 48, -1, -16, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31),
          -(2**31) - 1, 2**63 - 1, 2**63, 2**64 - 16, -(2**63))  # fmt: skip

integers = st.sampled_from(VALUES)
tensors = st.one_of(
    st.builds(
        lambda dtype, at: BUFFER[16 * at : 16 * at + 64].view(dtype)[at % 3 :],
        st.sampled_from(DTYPES),
        st.integers(0, 5),
    ),
    st.builds(lambda: torch.nn.Parameter(torch.empty(8))),
    st.just(HUGE),
)
scalars = st.one_of(integers, st.booleans(), st.sampled_from((0.0, 1.0, 2.5)), st.none())
descriptors = st.builds(
    lambda dtype, block: TensorDescriptor(BUFFER[:64].view(dtype), [4, 8], [8, 1], [1, block]),
    st.sampled_from((torch.float16, torch.bfloat16)),
    st.sampled_from((8, 16)),
)
nested_integers = st.recursive(
    st.lists(integers, max_size=3).map(tuple),
    lambda inner: st.lists(st.one_of(inner, integers), max_size=3).map(tuple),
    max_leaves=4,
)
KINDS = (integers, tensors, scalars, descriptors, nested_integers)
WRAPS = (
    lambda leaf: (None, leaf),
    lambda leaf: (BUFFER, (leaf, leaf)),
    lambda leaf: (None, leaf, 3),
    lambda leaf: Some(None, leaf, (1,)),
    lambda leaf: Other(None, leaf, (1,)),
)
CONSTANTS = ("K", "LAST", "num_warps")


@st.composite
def launches(draw: Any) -> list[tuple[list[Any], dict[str, Any]]]:
    """Launches that differ in one argument, by values of one kind: those that may be mixed up."""
    base = [
        draw(strategy)
        for strategy in (
            tensors, integers, integers, st.one_of(KINDS), st.one_of(KINDS), nested_integers,
        )
    ]  # fmt: skip
    # The first in a tuple is no int: what is an int in a tuple of ints has to be one always.
    wrap = draw(st.sampled_from((*WRAPS, lambda leaf: None, lambda leaf: None)))
    base.append(wrap(draw(st.one_of(KINDS))))
    constants = {"K": draw(st.sampled_from((1, 2))), "num_warps": 4, "enable_fp_fusion": True}
    place = draw(st.integers(0, 7))
    kind = draw(st.sampled_from(KINDS))
    found = [(base, constants)]
    for _ in range(draw(st.integers(1, 8))):
        args, changed = list(base), dict(constants)
        if place == 7:
            name = draw(st.sampled_from(CONSTANTS))
            values = (8, 4) if name == "num_warps" else (0, 1, True, 1.0, "a", None, (1, 2))
            changed[name] = draw(st.sampled_from(values))
        elif place == 6:
            args[6] = draw(st.sampled_from(WRAPS))(draw(kind))
        elif place == 5:
            args[5] = draw(nested_integers)
        else:
            args[place] = draw(kind if place else tensors)
        found.append((args, changed))
    return found


@pytest.mark.parametrize("target", [H100, MI300], ids=["cuda", "hip"])
@given(data=launches())
@settings(deadline=None, max_examples=400)
def test_the_kernel_is_the_one_that_triton_takes(target, data):
    """After any launches, each launch is that of `kernel[grid](...)`, whatever was kept."""
    with uncompiled(target) as gpu:
        for args, constants in data * 3:
            with maybe_overflow() as failed:
                _launch.launch(any_kernel, 5, *args, **constants)
            if failed:
                continue
            ours = gpu.launches[-1]
            any_kernel[(5,)](*args, **constants)
            theirs = gpu.launches[-1]
            assert ours[:3] == theirs[:3]  # grid, stream, function
            assert len(ours.args) == len(theirs.args)
            assert all(a is b or a == b for a, b in zip(ours.args, theirs.args, strict=True))


@contextmanager
def maybe_overflow() -> Iterator[list[bool]]:
    """Triton refuses an int of more than 64 bits, and so do we."""
    failed: list[bool] = []
    try:
        yield failed
    except OverflowError:
        failed.append(True)


def launch(n: int = 3, m: int = 5, *, first: Any = BUFFER, **constants: Any) -> None:
    args = (first, n, m, 0.5, None, (n, m, (8, 1)), (first, n))
    _launch.launch(any_kernel, 5, *args, **{"K": 1, "enable_fp_fusion": True, **constants})


def test_triton_is_asked_once_for_each_kernel(gpu, asked):
    """New values of ints and floats that are not specialised are launched without it."""

    def go(n: int, x: float = 0.5, first: Any = BUFFER, **constants: Any) -> int:
        args = (first, n, None, x, True, (3, 5), None)
        _launch.launch(any_kernel, 5, *args, **{"K": 1, **constants})
        return gpu.launches[-1].function

    functions = {go(n) for n in (3, 5, 1, 16, -3, 2**31 - 1)} | {go(3, x) for x in (0.0, 1.0)}
    assert len(functions) == len(asked) == 1
    assert go(2**31) == go(2**40) != go(3)
    assert len(asked) == 2
    others = [go(3, K=2), go(3, num_warps=8), go(3, first=BUFFER[1:])]
    assert len(asked) == 5
    assert [go(4, K=2), go(5, num_warps=8), go(6, first=BUFFER[2:])] == others
    assert len(asked) == 5
    assert len(functions.union(others)) == 4


def test_a_tuple_may_hold_tensors_after_it_held_ints(gpu, asked):
    def go(part: Any) -> int:
        _launch.launch(any_kernel, 5, BUFFER, 3, 5, 0.5, None, (3, 5), part, K=1)
        return gpu.launches[-1].function

    ints, tensor = (3, 5), (BUFFER, 5)
    found = [go(part) for part in (ints, ints, tensor, tensor, ints, tensor, ints)]
    assert found == [found[0], found[0], found[2], found[2], found[0], found[2], found[0]]
    assert found[0] != found[2]
    assert len(asked) == 4  # the plan changed once
    other = torch.empty(64, dtype=torch.float16)
    assert go((other, 5)) not in found


def test_tuples_that_hold_now_this_now_that_keep_their_plan(gpu, asked):
    ints, tensor = (3, 5), (BUFFER, 5)
    plans = []
    for strides, more in [(ints, ints), *[(tensor, ints), (ints, tensor)] * 4]:
        _launch.launch(any_kernel, 5, BUFFER, 3, 5, 0.5, None, strides, more, K=1)
        plans.append(_compiled._kernels[id(any_kernel)].plan)
        if len(plans) == 5:
            asked.clear()
    assert asked == []
    assert len(set(map(id, plans[4:]))) == 1


def test_no_tensor_is_kept_alive(gpu):
    held = torch.empty(8)
    gone = weakref.ref(held)
    for part in ((3, 5), (held, 5), (held, 5), (held, 5)):
        _launch.launch(any_kernel, 5, held, 3, 5, 0.5, held, (3, 5), part, K=1)
    gpu.launches.clear()
    del held, part
    assert gone() is None


def test_constants_are_told_apart_by_name(gpu, asked):
    for _ in range(3):
        for constants in ({"K": 1, "LAST": 2}, {"LAST": 1, "K": 2}):
            _launch.launch(any_kernel, 5, BUFFER, 3, 5, 0.5, None, (3,), None, **constants)
            assert gpu.launches[-1].args[-2:] == (constants["K"], constants["LAST"])
    assert len(asked) == 2


def test_amd_asks_how_large_a_storage_is():
    small = torch.empty(64, dtype=HUGE.dtype)
    with uncompiled(MI300) as gpu:
        for tensor in (small, small, HUGE, HUGE, small, HUGE):
            launch(first=tensor)
    functions = [one.function for one in gpu.launches]
    assert functions == [functions[0]] * 2 + [functions[2]] * 2 + [functions[0], functions[2]]
    assert functions[0] != functions[2]


def test_tables_are_bounded(gpu, monkeypatch):
    monkeypatch.setattr(_compiled, "MOST", 8)
    for number in range(1, 200, 2):
        launch(number)
        launch(number, K=number)
    assert len(_compiled._kernels[id(any_kernel)].ready) <= 8


def test_run_time_arguments_by_name_are_left_to_triton(gpu, asked):
    for number in (3, 5):
        args = (BUFFER, 3, 5, 0.5, None, (3,))
        _launch.launch(any_kernel, 5, *args, K=1, more=(BUFFER, number))
        assert gpu.launches[-1].args[6] == (BUFFER, number)
    assert len(asked) == 2


def test_other_types_are_left_to_triton(gpu, asked):
    class Pointer:
        dtype = torch.float32

        def data_ptr(self) -> int:
            return 64

    for _ in range(2):
        args = (BUFFER, 3, 5, Pointer(), None, (3,), (BUFFER,))
        _launch.launch(any_kernel, 5, *args, K=1)
    assert len(asked) == 2
    assert not _compiled._kernels[id(any_kernel)].ready


# --- where and how it is launched -----------------------------------------------------------------


def test_the_stream_is_the_current_one(gpu):
    for stream in (0, 11, 12, 11):
        gpu.stream = stream
        launch()
        assert gpu.launches[-1].stream == stream


def test_each_device_has_its_own_kernels(gpu, asked):
    functions = []
    for device in (0, 1, 0, 1):
        gpu.device = device
        launch()
        functions.append(gpu.launches[-1].function)
    assert functions[:2] == functions[2:]
    assert functions[0] != functions[1]
    assert len(asked) == 2


class OnDeviceOne(torch.Tensor):
    def get_device(self) -> int:
        return 1


def test_tensors_of_another_device_are_launched_there(gpu, monkeypatch):
    entered = []

    @contextmanager
    def switched(index: int) -> Iterator[None]:
        entered.append(index)
        gpu.device = index
        yield
        gpu.device = 0

    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu.device)
    there = torch.empty(64).as_subclass(OnDeviceOne)
    for _ in range(3):
        launch(first=there)
        assert gpu.launches[-1].stream == 0
    assert entered == [1, 1, 1]
    assert gpu.device == 0
    assert {key[1] for key in _compiled._kernels[id(any_kernel)].ready} == {1}
    monkeypatch.setattr(_compiled, "WHY_NOT", "for this test")
    _compiled.forget()
    launch(first=there)
    assert entered == [1] * 4


def test_hooks_of_triton_are_called(gpu, asked):
    """A profiler's: the same metadata as Triton's own launch gives, and only while they are set."""
    told: list[tuple[str, Any]] = []

    def enter(metadata: Any) -> None:
        told.append(("enter", metadata.get()))

    def leave(metadata: Any) -> None:
        told.append(("leave", metadata.get()))

    launch()
    launch()
    assert gpu.launches[-1].metadata is None
    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        launch()
        args = (BUFFER, 3, 5, 0.5, None, (3, 5, (8, 1)), (BUFFER, 3))
        any_kernel[(5,)](*args, K=1, enable_fp_fusion=True)
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)
    assert [name for name, _ in told] == ["enter", "leave"] * 2
    assert told[0][1]["name"] == "any_kernel"
    assert told[:2] == told[2:]
    launch()
    assert len(told) == 4
    assert len(asked) == 2  # the first, and the one of this test


@pytest.mark.parametrize(
    "knob, value",
    [
        ("runtime.debug", True),
        ("compilation.instrumentation_mode", "profile"),
        ("runtime.add_stages_inspection_hook", lambda: ("key", "hash")),
    ],
)
def test_triton_launches_what_is_debugged_or_instrumented(gpu, asked, monkeypatch, knob, value):
    launch()
    launch()
    usual = gpu.launches[-1].function
    assert len(asked) == 1
    section, name = knob.split(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(knobs, section), name, value)
        launch()
        launch()
        assert len(asked) == 3
    launch()
    assert len(asked) == 3
    assert gpu.launches[-1].function == usual


def test_pre_run_hooks_are_called(gpu, monkeypatch):
    seen: list[Any] = []
    launch()
    monkeypatch.setattr(any_kernel, "pre_run_hooks", [lambda *args, **kwargs: seen.append(args)])
    launch()
    assert len(seen) == 1


def test_a_launch_that_a_hook_prevents_is_not_kept(gpu, monkeypatch):
    monkeypatch.setattr(JITFunction, "_do_compile", lambda *args: None)
    launch()
    assert gpu.launches == []
    assert not _compiled._kernels[id(any_kernel)].ready


def test_launches_from_several_threads(gpu):
    """Each launch has the function of its class, whatever the others are doing."""
    launches = {n: BUFFER[n:] for n in range(8)}
    expected = {}
    for n, tensor in launches.items():
        launch(n, first=tensor)
        expected[n] = gpu.launches[-1].function
    gpu.launches.clear()
    _compiled.forget()
    barrier = threading.Barrier(4)
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            barrier.wait()
            for number in range(300):
                n = (number * 5 + seed) % 8
                launch(n, first=launches[n])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(gpu.launches) == 1200
    assert all(one.function == expected[one.args[1]] for one in gpu.launches)


def test_no_torch_op_runs(gpu):
    """Nothing to wait for, nothing to allocate: a launch can be captured in a CUDA graph."""

    class Ops(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            raise AssertionError(f"{op} was called")

    odd = BUFFER[1:]
    with Ops():
        for _ in range(3):
            launch()
            launch(first=odd)
    assert len(gpu.launches) == 6


# --- other releases, and the interpreter ----------------------------------------------------------


@pytest.mark.parametrize("version, why", [
    ("3.5.1", "not compared"), ("3.10.0", "not compared"), ("4.0.0+git1", "not compared"),
])  # fmt: skip
def test_releases_that_were_not_compared(monkeypatch, version, why):
    monkeypatch.setattr(triton, "__version__", version)
    assert why in str(_compiled._why_not())


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0", "3.9.1+git"])
def test_releases_that_were_compared(monkeypatch, version):
    monkeypatch.setattr(triton, "__version__", version)
    assert _compiled._why_not() is None


def test_a_release_that_lacks_something(monkeypatch):
    monkeypatch.delattr(_compiled.CompiledKernel, "launch_metadata")
    assert _compiled._why_not() == f"triton {triton.__version__} has no launch_metadata"


def test_triton_launches_everything_where_it_has_to(gpu, asked, monkeypatch):
    monkeypatch.setattr(_compiled, "WHY_NOT", "for this test")
    for _ in range(3):
        launch()
    assert len(asked) == len(gpu.launches) == 3
    assert not _compiled._kernels


def test_what_is_no_compiled_function_is_called():
    """Under TRITON_INTERPRET=1 a kernel is an object of another class."""
    grids, given = [], []

    class Interpreted:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return lambda *args, **kwargs: given.append((args, kwargs))

    _launch.launch(Interpreted(), 4, BUFFER, 2, K=3)
    assert grids == [(4,)]
    assert given == [((BUFFER, 2), {"K": 3})]


# --- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(launch_overhead.CALLS))
def test_a_launch_costs_less_than_tritons(name):
    """About a third (docs/triton-kernels.md); with new shapes as well where ints are no tuples."""
    cost = launch_overhead.measure(launch_overhead.CALLS[name], rounds=12, launches=50)
    assert cost.ours < 0.6 * cost.bare, cost
    if name == "attention, strides one by one":
        assert cost.ours_new < 0.8 * cost.bare_new, cost
