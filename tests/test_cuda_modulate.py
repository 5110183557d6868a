"""The CUDA kernels of modulate, executed on the CPU."""

from __future__ import annotations

import cuda_host
import pytest
import torch
from cuda_gates import check_case, same_bits_whatever_the_schedule
from cuda_host import (
    host,  # noqa: F401
    kernels_of,
)

from mmfast.testing.gate_cases import GateCase

pytestmark = pytest.mark.usefixtures("host")

AFFINE = (("weight", "C"), ("bias", "C"))
NORMS = (None, "layer", "rms")


def sides(gate: str, scale: str, shift: str) -> tuple[tuple[str, str], ...]:
    return (("gate", gate), ("scale", scale), ("shift", shift), *AFFINE)


def _case(shape, forms=("BC", "BC", "BC"), **more):
    return GateCase(
        "modulate", f"own_{'_'.join(forms)}", shape, sides=sides(*forms), residual=True, **more
    )


def arguments(B: int, N: int, C: int, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    data = [tensor(B, N, C) for _ in range(4)]  # dout, dh, x, h
    return data, [tensor(B, 1, C) for _ in range(3)], [tensor(C) for _ in range(2)]


@pytest.mark.parametrize("name, dtype", cuda_host.gate_cases("modulate"))
def test_case(name, dtype):
    cuda_host.check_gate(name, dtype)


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
@pytest.mark.parametrize("form", ["C", "BC", "BNC", "1NC"])
@pytest.mark.parametrize("norm", NORMS)
def test_wide(norm, form, dtype):
    """Rows that begin at multiples of 16 bytes, which the registry's mostly do not."""
    check_case(_case((3, 7, 72), (form,) * 3, norm=norm), dtype)
    if dtype != torch.float32:
        check_case(_case((3, 7, 64), (form,) * 3, norm=norm, side_dtype="float32"), dtype)


@pytest.mark.parametrize("C", [8, 16, 24, 40, 136, 257, 264, 520, 1032, 2056, 2057, 4096])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_teams_of_a_row(norm, C):
    """Lanes of part of a warp, of several warps, of a whole block."""
    check_case(_case((2, 5, C), norm=norm), torch.float32)
    check_case(_case((2, 5, C), ("C", "BC", "BNC"), norm=norm), torch.bfloat16)


@pytest.mark.parametrize("C", [4104, 8200, 9001])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("forms", [("BC", "BC", "BC"), ("BNC", "BNC", "BNC"), ("C", "BNC", "C")])
def test_rows_that_are_read_in_tiles(forms, norm, C):
    """Past 4096 columns in the backward, past 8192 in the forward."""
    check_case(_case((1, 3, C), forms, norm=norm), torch.float32)
    check_case(GateCase("modulate", "plain", (1, 2, C), norm=norm), torch.float16)


def test_a_mean_far_from_zero_in_tiles():
    check_case(GateCase("modulate", "far", (1, 3, 9000), special="offset"), torch.float32)


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
@pytest.mark.parametrize(
    "forms",
    [("BC", "1NC", "C"), ("1NC", "BC", "BNC"), ("1NC", "1NC", "1NC"), ("C", "C", "1NC"),
     ("C", "BC", "1C")],
)  # fmt: skip
def test_sums_over_items_and_over_rows(forms, dtype):
    for shape in ((3, 21, 37), (3, 1, 40), (1, 21, 40)):
        check_case(_case(shape, forms), dtype)


@pytest.mark.parametrize("C", [37, 40])
@pytest.mark.parametrize("forms", [("BC", "BC", "C"), ("C", "C", "C"), ("1NC", "C", "1NC")])
def test_several_blocks_for_each_sum(forms, C):
    check_case(_case((3, 1500, C), forms), torch.float32)


@pytest.mark.parametrize("forms", [("BC", "BC", "BC"), ("BNC", "BNC", "BNC"), ("C", "1NC", "C")])
@pytest.mark.parametrize("norm", [0, 1])
def test_only_what_is_needed(norm, forms):
    """Each gradient alone is what it is beside the others, and all that is made."""
    (dout, dh, x, h), _, (weight, bias) = arguments(2, 7, 33)
    shapes = {"BC": (2, 1, 33), "BNC": (2, 7, 33), "C": (1, 1, 33), "1NC": (1, 7, 33)}
    gate, scale, shift = (torch.randn(shapes[form]) for form in forms)
    bwd = cuda_host.op("modulate_bwd")
    rest = (dout, dh, x, h, gate, scale, weight, bias, norm, 1e-5, shift)
    together = bwd(*rest, [True] * 7)
    for alone in range(7):
        needs = [place == alone for place in range(7)]
        for place, grad in enumerate(bwd(*rest, needs)):
            if place == alone:
                torch.testing.assert_close(grad, together[place])
            else:
                assert grad.shape == (0,)
    assert not kernels_of(lambda: bwd(*rest, [False] * 7))


@pytest.mark.parametrize("N", [7, 300])
def test_an_absent_gradient_counts_as_zero(N):
    (dout, dh, x, h), (gate, scale, shift), (weight, bias) = arguments(2, N, 33)
    bwd = cuda_host.op("modulate_bwd")
    rest = (x, h, gate, scale, weight, bias, 1, 1e-5, shift, [True] * 7)
    zero = torch.zeros_like(dout)
    for given, absent in (((dout, zero), (dout, None)), ((zero, dh), (None, dh))):
        for a, b in zip(bwd(*given, *rest), bwd(*absent, *rest), strict=True):
            assert torch.equal(a, b)
    assert all(not grad.any() for grad in bwd(None, None, *rest))


def test_rows_do_not_reach_one_another():
    """eps = 0 makes lanes past the end of a row and rows past the end of a block 0 * inf."""
    (dout, dh, x, residual), (gate, scale, shift), (weight, bias) = arguments(3, 5, 17)
    fwd, bwd = cuda_host.op("modulate_fwd"), cuda_host.op("modulate_bwd")

    def run():
        out, h = fwd(x, residual, gate, scale, shift, weight, bias, 1, 0.0)
        rest = (gate, scale, weight, bias, 1, 0.0, shift, [True] * 7)
        return out, h, *bwd(dout, dh, x, h, *rest)[:5]

    clean = run()
    x[1] = float("nan")
    for whole, poisoned in zip(clean, run(), strict=True):
        assert whole.isfinite().all()
        assert torch.equal(whole[[0, 2]], poisoned[[0, 2]])
        assert poisoned[1].isnan().any() or poisoned[1].equal(whole[1])  # dshift is the sum of dout


@pytest.mark.parametrize("forms", [("BC", "BC", "BC"), ("1NC", "BC", "C"), ("BNC", "C", "1NC")])
def test_the_same_bits_every_time(forms):
    (dout, dh, x, h), _, (weight, bias) = arguments(2, 300, 136)
    shapes = {"BC": (2, 1, 136), "BNC": (2, 300, 136), "C": (1, 1, 136), "1NC": (1, 300, 136)}
    gate, scale, shift = (torch.randn(shapes[form]) for form in forms)
    fwd, bwd = cuda_host.op("modulate_fwd"), cuda_host.op("modulate_bwd")
    rest = (weight, bias, 1, 1e-5)
    same_bits_whatever_the_schedule(lambda: fwd(x, h, gate, scale, shift, *rest))
    same_bits_whatever_the_schedule(
        lambda: bwd(dout, dh, x, h, gate, scale, *rest, shift, [True] * 7)
    )


def test_sums_over_rows_lose_nothing():
    """What blocks leave is added as if in twice the precision: 2^38 comes and goes, ones stay."""
    quarter, C = 8192, 4
    dout = torch.ones(1, 4 * quarter, C)
    dout[:, :quarter], dout[:, 2 * quarter : 3 * quarter] = 2.0**24, -(2.0**24)
    x, bias = torch.ones_like(dout), torch.zeros(C)
    bwd = cuda_host.op("modulate_bwd")
    rest = (None, x, None, None, None, None, bias, 0, 1e-5, None, [False] * 6 + [True])
    assert torch.equal(bwd(dout, *rest)[6], torch.full((C,), 2.0 * quarter))
    dout[0, 0, 0] = float("inf")
    grad = bwd(dout, *rest)[6]
    assert grad[0] == float("inf")
    assert torch.equal(grad[1:], torch.full((C - 1,), 2.0 * quarter))


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
def test_instances(dtype):
    """Every kernel of a storage dtype, with accesses of 16 bytes and of one element."""
    name = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    fwd, bwd = cuda_host.op("modulate_fwd"), cuda_host.op("modulate_bwd")
    found, nothing, needs = set(), (None,) * 4, [True] + [False] * 6
    for C in (24, 33, 4104, 4105):
        x = torch.randn(1, 2, C).to(dtype)
        found |= {*kernels_of(lambda x=x: fwd(x, *nothing, None, None, 1, 1e-5))}
        found |= {*kernels_of(lambda x=x: bwd(x, None, x, *nothing, None, 1, 1e-5, None, needs))}
    own = [one for one in found if "modulate" in one]
    for kernel in ("modulate_fwd", "modulate_bwd", "modulate_stats"):
        forms = [one for one in own if f"{kernel}_kernel" in one]
        assert len(forms) == 2 and all(name in one for one in forms), own
    assert len(own) == 6


def test_offsets_beyond_32_bits():
    apart = 2**31 + 8
    memory = torch.UntypedStorage(2 * (apart + 64))  # never touched but for two rows
    far = torch.empty(0, dtype=torch.float16).set_(memory, 0, (2, 3, 8), (apart, 8, 1))
    far.copy_(torch.randn(2, 3, 8))
    fwd, bwd = cuda_host.op("modulate_fwd"), cuda_host.op("modulate_bwd")
    side = torch.randn(2, 1, 8).half()
    for norm in (0, 1, 2):
        results = [
            (
                *fwd(x, x, side, side, None, None, None, norm, 1e-5),
                *bwd(x, x, x, x, side, side, None, None, norm, 1e-5, None, [True] * 7)[:4],
            )
            for x in (far, far.contiguous())
        ]
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(1, 1, 9), (2, 1, 9), (1, 5, 9)])
def test_incoming_gradient_of_a_sum(shape):
    """Expanded: some of its strides are 0."""
    (_, _, x, h), (gate, scale, shift), (weight, bias) = arguments(2, 5, 9)
    dout = torch.randn(shape).expand(2, 5, 9)
    bwd = cuda_host.op("modulate_bwd")
    rest = (x, h, gate, scale, weight, bias, 1, 1e-5, shift, [True] * 7)
    found = bwd(dout, dout, *rest)
    torch.testing.assert_close(found, bwd(dout.contiguous(), dout.contiguous(), *rest))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: (x, x[:, :2], None, None, None, None, None, 1), "data must have one shape"),
        (lambda x: (x, x.half(), None, None, None, None, None, 1), "one dtype"),
        (lambda x: (x, None, x[:, :1], None, None, None, None, 1), "a gate needs a residual"),
        (lambda x: (x, None, None, x[:, :2], None, None, None, 1), "must be .B or 1, N or 1, C."),
        (lambda x: (x, None, None, x[:, :1, :1], None, None, None, 1), "N or 1, C."),
        (lambda x: (x, None, None, None, x[:, :1].half(), None, None, 1), "dtype of x or float32"),
        (lambda x: (x, None, None, None, None, x[0, 0, :4], None, 1), "must be dense .C."),
        (lambda x: (x, None, None, None, None, None, None, 3), "norm is 0, 1 or 2"),
        (lambda x: (x.mT, None, None, None, None, None, None, 1), "must be dense"),
        (lambda x: (x[0], None, None, None, None, None, None, 1), "x must be"),
    ],
)
def test_what_would_be_unsafe_is_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        cuda_host.op("modulate_fwd")(*call(torch.randn(2, 3, 8)), 1e-5)
