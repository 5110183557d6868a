"""The CUDA kernels of adaptation_gate, executed on the CPU."""

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


def _case(shape, **more):
    more = {"sides": AFFINE, "beta": 0.5, **more}
    return GateCase("adaptation_gate", f"own_{more.get('row_mask', '')}", shape, **more)


def arguments(B: int, N: int, C: int):
    g = torch.Generator().manual_seed(0)
    data = [torch.randn(B, N, C, generator=g) for _ in range(3)]  # dout, z, h
    return data, [torch.randn(C, generator=g) for _ in range(2)]


@pytest.mark.parametrize("name, dtype", cuda_host.gate_cases("adaptation_gate"))
def test_case(name, dtype):
    cuda_host.check_gate(name, dtype)


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
@pytest.mark.parametrize("special, row_mask", [("", "BN"), ("zero_rows", "1N"), ("zero_rows", "")])
def test_wide(special, row_mask, dtype):
    """Rows that begin at multiples of 16 bytes, which the registry's mostly do not."""
    check_case(_case((3, 7, 72), special=special, row_mask=row_mask), dtype)
    if dtype != torch.float32:
        more = {"special": special, "row_mask": row_mask, "side_dtype": "float32"}
        check_case(_case((3, 7, 64), **more), dtype)


@pytest.mark.parametrize("C", [8, 16, 24, 40, 136, 257, 264, 520, 1032, 2056, 2057, 4096])
def test_teams_of_a_row(C):
    """Lanes of part of a warp, of several warps, of a whole block."""
    check_case(_case((2, 5, C), row_mask="BN"), torch.float32)
    check_case(_case((2, 5, C), special="zero_rows"), torch.bfloat16)


@pytest.mark.parametrize("C", [4104, 8200, 9001])
@pytest.mark.parametrize("sides", [AFFINE, AFFINE[:1], ()])
@pytest.mark.parametrize("special, row_mask", [("", "BN"), ("zero_rows", "")])
def test_rows_that_are_read_in_tiles(special, row_mask, sides, C):
    """Past 4096 columns in the backward, past 8192 in the forward."""
    more = {"special": special, "row_mask": row_mask, "sides": sides}
    check_case(_case((1, 4, C), **more), torch.float32)
    check_case(_case((1, 2, C), **more), torch.float16)


@pytest.mark.parametrize("C", [37, 40])
def test_several_blocks_for_each_sum(C):
    check_case(_case((3, 1500, C), row_mask="BN"), torch.float32)


@pytest.mark.parametrize("N, C", [(5, 33), (300, 40), (3, 4100)])
def test_only_what_is_needed(N, C):
    """Each gradient alone has the bits that it has beside the others, and is all that is made."""
    (dout, z, h), (weight, bias) = arguments(2, N, C)
    bwd = cuda_host.op("adaptation_gate_bwd")
    rest = (dout, z, h, weight, bias, None, 0.5, 1e-5)
    together = bwd(*rest, [True] * 4)
    for chosen in range(16):
        needs = [bool(chosen >> i & 1) for i in range(4)]
        for grad, needed, whole in zip(bwd(*rest, needs), needs, together, strict=True):
            assert torch.equal(grad, whole) if needed else grad.shape == (0,)
    assert not kernels_of(lambda: bwd(*rest, [False] * 4))


def test_rows_do_not_reach_one_another():
    """eps = 0 makes lanes past the end of a row and rows past the end of a block 0 * inf."""
    (dout, z, h), (weight, bias) = arguments(3, 5, 17)
    fwd, bwd = cuda_host.op("adaptation_gate_fwd"), cuda_host.op("adaptation_gate_bwd")

    def run():
        rest = (z, h, weight, bias, None, 0.5, 0.0)
        return fwd(*rest), *bwd(dout, *rest, [True] * 4)

    clean = run()
    assert all(result.isfinite().all() for result in clean)
    h[1, 2, 3] = float("nan")
    for whole, poisoned in zip(clean[:3], run()[:3], strict=True):
        assert torch.equal(whole[[0, 2]], poisoned[[0, 2]])
        assert torch.equal(whole[1, :2], poisoned[1, :2])
        assert poisoned[1, 2].isnan().all()


def test_small_norms_have_finite_gradients():
    """1 / |h|^2 would be inf in float32."""
    (dout, z, h), (weight, bias) = arguments(2, 5, 32)
    bwd = cuda_host.op("adaptation_gate_bwd")
    grads = bwd(dout, z * 1e-21, h * 3e-21, weight, bias, None, 1.0, 1e-5, [True] * 4)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("C", [24, 33, 4104])
def test_what_h_holds_in_a_masked_row_is_not_read(C, value):
    (dout, z, h), (weight, bias) = arguments(2, 3, C)
    mask = torch.tensor([[False, True, True], [True, False, True]])
    fwd, bwd = cuda_host.op("adaptation_gate_fwd"), cuda_host.op("adaptation_gate_bwd")

    def run(h):
        rest = (z, h, weight, bias, mask, 0.5, 1e-5)
        return fwd(*rest), *bwd(dout, *rest, [True] * 4)

    good, found = run(h), run(h.masked_fill(~mask.unsqueeze(-1), value))
    for got, expected in zip(found, good, strict=True):
        assert torch.equal(got, expected)
    assert not found[2][~mask].any()


def test_the_same_bits_every_time():
    (dout, z, h), (weight, bias) = arguments(2, 300, 136)
    fwd, bwd = cuda_host.op("adaptation_gate_fwd"), cuda_host.op("adaptation_gate_bwd")
    rest = (z, h, weight, bias, None, 0.5, 1e-5)
    same_bits_whatever_the_schedule(lambda: fwd(*rest))
    same_bits_whatever_the_schedule(lambda: bwd(dout, *rest, [True] * 4))


def test_sums_over_rows_lose_nothing():
    """What blocks leave is added as if in twice the precision: 2^38 comes and goes, ones stay."""
    quarter, C = 8192, 4
    dout = torch.ones(1, 4 * quarter, C)
    dout[:, :quarter], dout[:, 2 * quarter : 3 * quarter] = 2.0**24, -(2.0**24)
    z, bias = torch.ones_like(dout), torch.zeros(C)
    needs = [False, False, False, True]
    bwd = cuda_host.op("adaptation_gate_bwd")
    grad = bwd(dout, z, z, None, bias, None, 0.5, 1e-5, needs)[3]
    assert torch.equal(grad, torch.full((C,), 2.0 * quarter))


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
def test_instances(dtype):
    """Every kernel of a storage dtype, with accesses of 16 bytes and of one element."""
    name = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    fwd, bwd = cuda_host.op("adaptation_gate_fwd"), cuda_host.op("adaptation_gate_bwd")
    found = set()
    for C in (24, 33, 4104, 4105):
        x = torch.randn(1, 2, C).to(dtype)
        rest = (None, None, None, 0.5, 1e-5)
        found |= {*kernels_of(lambda x=x, rest=rest: fwd(x, x, *rest))}
        needs = [True, True, False, False]
        found |= {*kernels_of(lambda x=x, rest=rest, n=needs: bwd(x, x, x, *rest, n))}
    own = [one for one in found if "adaptation_gate" in one]
    for kernel in ("fwd", "bwd", "stats"):
        forms = [one for one in own if f"adaptation_gate_{kernel}_kernel" in one]
        assert len(forms) == 2 and all(name in one for one in forms), own
    assert len(own) == 6


def test_offsets_beyond_32_bits():
    apart = 2**31 + 8
    memory = torch.UntypedStorage(2 * (apart + 64))  # never touched but for two rows
    far = torch.empty(0, dtype=torch.float16).set_(memory, 0, (2, 3, 8), (apart, 8, 1))
    far.copy_(torch.randn(2, 3, 8))
    other = torch.randn(2, 3, 8).half()
    fwd, bwd = cuda_host.op("adaptation_gate_fwd"), cuda_host.op("adaptation_gate_bwd")
    rest = (None, None, None, 0.5, 1e-5)
    results = [
        (fwd(z, other, *rest), *bwd(z, z, other, *rest, [True, True, False, False])[:2])
        for z in (far, far.contiguous())
    ]
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda z: (z, z[:, :2], None, None, None), "data must have one shape"),
        (lambda z: (z, z.half(), None, None, None), "one dtype"),
        (lambda z: (z, z, z[0, 0, :4], None, None), "must be dense .C."),
        (lambda z: (z, z, None, z[0, 0].half(), None), "dtype of the data or float32"),
        (lambda z: (z, z, None, None, z[..., 0]), "row_mask must be bool"),
        (lambda z: (z, z, None, None, z[:, :2, 0] > 0), "row_mask must be bool"),
        (lambda z: (z.mT, z.mT, None, None, None), "must be dense"),
        (lambda z: (z[0], z[0], None, None, None), "z must be"),
    ],
)
def test_what_would_be_unsafe_is_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        cuda_host.op("adaptation_gate_fwd")(*call(torch.randn(2, 3, 8)), 0.5, 1e-5)
