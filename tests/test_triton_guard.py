"""The guard over the interpreter finds planted faults, and leaves no trace of itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from triton_helpers import HAS_TRITON, OutOfBoundsError, RaceError, interpreter

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


def copy_kernel(out_ptr, x_ptr, n, limit, shift, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * step + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + shift, mask=i < limit, other=0.0)
    tl.store(out_ptr + i, x, mask=i < n)


def in_place_kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (i + BLOCK) % n)
    tl.store(x_ptr + i, x, mask=i < n)


def atomic_kernel(x_ptr):
    tl.atomic_add(x_ptr, 1.0)


def same_address_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK).to(tl.float32))


def halves_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.load(x_ptr.to(tl.pointer_type(tl.int16)) + 2 * tl.arange(0, BLOCK))


copy = InterpretedFunction(copy_kernel)
in_place = InterpretedFunction(in_place_kernel)


@pytest.fixture(autouse=True)
def guarded() -> Iterator[None]:
    with interpreter():
        yield


def run(n: int = 20, limit: int = 20, shift: int = 0, step: int = 8) -> tuple[torch.Tensor, ...]:
    x, out = torch.arange(20.0), torch.empty(20)
    copy[(3,)](out, x, n, limit, shift, step, BLOCK=8)
    return x, out


def test_a_right_kernel_passes() -> None:
    x, out = run()
    assert torch.equal(x, out)


def test_what_is_never_written_is_nan() -> None:
    _, out = run(n=19, limit=19)
    assert out[:19].isfinite().all() and out[19].isnan()


def test_load_past_the_end() -> None:
    with pytest.raises(OutOfBoundsError, match="copy_kernel, program 2: load of 4 elements"):
        run(limit=24)


def test_load_before_the_start() -> None:
    with pytest.raises(OutOfBoundsError, match="program 0: load of 1 elements"):
        run(shift=-1)


def test_store_past_the_end() -> None:
    with pytest.raises(OutOfBoundsError, match="program 2: store of 1 elements"):
        run(n=21)


def test_between_the_elements_of_a_view() -> None:
    x, out = torch.arange(40.0)[::2], torch.empty(20)
    with pytest.raises(OutOfBoundsError, match="load of 4 elements"):
        copy[(3,)](out, x, 20, 20, 0, 8, BLOCK=8)


def test_another_part_of_the_same_storage() -> None:
    both = torch.zeros(60)
    with pytest.raises(OutOfBoundsError, match="store of 4 elements"):
        copy[(3,)](both[:20], both[40:], 24, 20, 0, 8, BLOCK=8)


def test_write_write_race() -> None:
    with pytest.raises(RaceError, match="written by program 1"):
        run(step=7)


def test_read_write_race_through_two_views() -> None:
    x = torch.arange(24.0)
    with pytest.raises(RaceError, match="program 1"):
        in_place[(3,)](x, 24, BLOCK=8)
    with pytest.raises(RaceError, match="read by program 1"):
        copy[(2,)](x[8:], x[:16], 16, 16, 0, 8, BLOCK=8)


def test_one_store_writes_an_address_twice() -> None:
    with pytest.raises(RaceError, match="twice"):
        InterpretedFunction(same_address_kernel)[(1,)](torch.zeros(8), BLOCK=8)


def test_floating_point_atomic() -> None:
    with pytest.raises(RaceError, match="atomic"):
        InterpretedFunction(atomic_kernel)[(2,)](torch.zeros(1))


def test_wrong_element_size() -> None:
    kernel, i = InterpretedFunction(halves_kernel), torch.zeros(8, dtype=torch.int32)
    with pytest.raises(OutOfBoundsError, match="load of 8 elements"):
        kernel[(1,)](i, BLOCK=8)


def test_partial_sums_in_groups() -> None:
    from mmfast.kernels._blocks import column_sums

    partials = torch.randn(3, 37, 50)
    outs = [torch.empty(4, 50), None, torch.empty(4, 50, dtype=torch.float16)]
    column_sums(partials, outs, 10)
    for s in (0, 2):
        for g in range(4):
            expected = partials[s, 10 * g : 10 * g + 10].sum(0)
            torch.testing.assert_close(outs[s][g].float(), expected, rtol=2e-3, atol=2e-3)


def test_inside_everything_is_interpreted() -> None:
    import mmfast.kernels._blocks as inside

    assert isinstance(inside.tanh, InterpretedFunction)
    assert isinstance(tl.sum, InterpretedFunction)


def test_leaving_restores_everything() -> None:
    modules = {name for name in sys.modules if name.startswith("mmfast.kernels")}
    with interpreter():  # nested: nothing changes for the outer one
        pass
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert {name for name in sys.modules if name.startswith("mmfast.kernels")} == modules
