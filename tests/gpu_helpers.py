"""What the tests on a GPU share: the device, inputs moved to it as they lie in memory, seeds of
dropout drawn as on the CPU, and the peak of memory.

The kernels under test are those of the backends `cuda` and `triton`, one after the other; on ROCm,
which torch calls "cuda" as well, Triton's alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import dispatch
from mmfast.testing import tolerance
from mmfast.testing.cases import Inputs

DEVICE = torch.device("cuda")
BACKENDS = ["cuda", "triton"]
HAS_DEVICE = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

gpu_only = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_DEVICE, reason="no CUDA device: the kernels run in the interpreter"),
]
"""The `pytestmark` of a file of such tests."""

T = TypeVar("T")


def some(names: Sequence[T]) -> Sequence[T]:
    """All; without a device one stands for all, so that a run says once what it leaves out."""
    return names if HAS_DEVICE else names[:1]


@pytest.fixture(params=some(BACKENDS), autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of a file that imports this runs on each backend of GPUs, and says why on none."""
    name: str = request.param
    probe = torch.zeros(1, 1, 1, 16, device=DEVICE)
    offers = dispatch.explain("cross_attention", probe, probe)
    (reason,) = (offer.reason for offer in offers if offer.backend == name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    with mmfast.use_backend(name):
        yield name


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` with the very same strides and offset: `.to` would straighten them out."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    copied = storage.to(device, copy=True)
    return copied.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on_device(inputs: T, device: torch.device = DEVICE) -> T:
    """`Inputs` or `GateInputs` with every tensor of it `moved`."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return moved(value, device)
        if isinstance(value, dict):
            return {name: move(part) for name, part in value.items()}
        return value

    fields = dataclasses.fields(inputs)  # type: ignore[arg-type]
    return dataclasses.replace(inputs, **{f.name: move(getattr(inputs, f.name)) for f in fields})


@contextmanager
def seeds_of_the_cpu() -> Iterator[None]:
    """`torch.randint` draws on the CPU and moves: a device's generator gives another dropout seed
    for the same `torch.manual_seed`, and what results are held against was drawn on the CPU."""
    draw = torch.randint

    def randint(*args: Any, device: Any = None, **options: Any) -> Tensor:
        return draw(*args, **options).to(device)

    torch.randint = randint
    try:
        yield
    finally:
        torch.randint = draw


def run_on_device(inputs: Inputs, device: torch.device = DEVICE) -> tolerance.Results:
    """`tolerance.run` of `mmfast.cross_attention`, with the CPU's dropout seed; results stay on the
    device."""
    with seeds_of_the_cpu():
        return tolerance.run(mmfast.cross_attention, on_device(inputs, device))


def on_cpu(results: tolerance.Results) -> tolerance.Results:
    return {name: part.cpu() for name, part in results.items()}


def assert_same_bits(results: tolerance.Results, expected: tolerance.Results) -> None:
    """Of two runs. NaN is equal to nothing, and there must be none."""
    assert results.keys() == expected.keys()
    for name, part in expected.items():
        assert torch.equal(results[name], part), f"{name} differs"


def some_heads(inputs: Inputs, heads: Sequence[int]) -> Inputs:
    """The same problem with these heads alone; heads are independent. For cases without GQA, and
    without what spans heads."""
    case = dataclasses.replace(inputs.case, H=len(heads), G=len(heads))
    parts = {name: getattr(inputs, name)[:, list(heads)] for name in ("q", "k", "v", "dout")}
    return dataclasses.replace(inputs, case=case, **parts)


def peak_bytes(run: Callable[[], object]) -> int:
    """Device memory of one call beyond what was there before it, its results included."""
    run()  # kernels compiled, workspaces of libraries in place
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def require_memory(gib: float) -> None:
    """Skips where the device has less free memory."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"{free:.1f} GiB of device memory are free, {gib:.1f} are needed")
