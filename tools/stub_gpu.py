"""A GPU that is not there: Triton compiles for it for real, and launching does nothing.

`with stub_gpu() as gpu:` makes it Triton's driver. `gpu.launches` has what every launch was given,
unless `record` is false. For measuring and testing what a launch costs on the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

H100 = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024


class Launched(NamedTuple):
    """One launch: the grid, the stream, the function's handle, the hooks' argument, arguments."""

    grid: tuple[int, int, int]
    stream: int
    function: int
    metadata: Any
    args: tuple[Any, ...]


class _Utils:
    """Loading gives a new handle and keeps nothing."""

    def __init__(self) -> None:
        self._handles = itertools.count(1)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return next(self._handles), next(self._handles), 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED, "multiprocessor_count": 132}


class StubGpu(DriverBase):
    """The driver. `device` and `stream` are what is current."""

    def __init__(self, target: GPUTarget, record: bool) -> None:
        super().__init__()
        self.target, self.device, self.stream = target, 0, 0
        self.launches: list[Launched] = []
        self.utils = _Utils()
        self.launcher_cls = self._recorder if record else self._idler

    def _idler(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None

    def _recorder(self, source: Any, metadata: Any) -> Any:
        def launcher(
            x: int, y: int, z: int, stream: int, function: int, packed: Any, told: Any,
            entered: Any, left: Any, *args: Any,
        ) -> None:  # fmt: skip
            if entered is not None:
                entered(told)
            self.launches.append(Launched((x, y, z), stream, function, told, args))
            if left is not None:
                left(told)

        return launcher

    @classmethod
    def is_active(cls) -> bool:
        """Never chosen by Triton itself."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Not needed: no launcher is compiled."""
        raise NotImplementedError(ty)

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """The number of the current device."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """The handle of the current stream."""
        return self.stream

    def get_active_torch_device(self) -> Any:
        """Not needed: nothing is allocated."""
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        """Not needed: nothing runs."""
        raise NotImplementedError


@contextmanager
def stub_gpu(target: GPUTarget = H100, *, record: bool = True) -> Iterator[StubGpu]:
    """The stub as Triton's driver; the one before at the end."""
    gpu = StubGpu(target, record)
    config = triton.runtime.driver
    before = config._active
    config.set_active(gpu)
    try:
        yield gpu
    finally:
        config._active = before
