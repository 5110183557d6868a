"""The CUDA kernels of gated_residual, executed on the CPU."""

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

FORMS = ("1", "C", "BC", "1C", "B1", "BNC", "BN1", "B1C", "1NC", "1N1", "11C")


def _case(shape, form, **more):
    more.setdefault("activation", "tanh")
    return GateCase("gated_residual", f"own_{form}", shape, sides=(("gate", form),), **more)


@pytest.mark.parametrize("name, dtype", cuda_host.gate_cases("gated_residual"))
def test_case(name, dtype):
    cuda_host.check_gate(name, dtype)


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_wide(form, dtype):
    """Rows that begin at multiples of 16 bytes, which the registry's mostly do not."""
    check_case(_case((3, 7, 72), form, row_mask="BN"), dtype)
    if dtype != torch.float32:
        check_case(_case((3, 7, 64), form, side_dtype="float32", activation="sigmoid"), dtype)


@pytest.mark.parametrize("form", ["1", "C", "BC", "1NC", "1N1"])
@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
def test_large_sums(form, dtype):
    """Several blocks for each sum, along rows and along columns."""
    B, N = (600, 5) if "N" in form else (2, 600)
    check_case(_case((B, N, 136), form, activation="sigmoid", row_mask="BN"), dtype)
    check_case(_case((B, N, 37), form, activation="identity"), dtype)


@pytest.mark.parametrize("C", [24, 520, 1040, 100, 257, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teams_of_a_row(C, dtype):
    """A gate for each row: lanes of part of a warp, of several warps, of the whole block."""
    check_case(_case((2, 5, C), "BN1", activation="sigmoid", row_mask="BN"), dtype)


def test_teams_of_many_rows():
    """Warps at most, several rows a block, the last one not full."""
    check_case(_case((3, 1501, 300), "BN1"), torch.float32)


def test_long_rows_that_are_summed():
    """A gate of one number: several column tiles of one row."""
    check_case(_case((1, 2, 9001), "1"), torch.float32)
    check_case(_case((1, 3, 4096), "C"), torch.bfloat16)


@pytest.mark.parametrize("gate_shape", [(1, 1, 17), (3, 5, 17), (3, 5, 1), (3, 1, 1), (1, 5, 17)])
@pytest.mark.parametrize("need_dy, need_dgate", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(gate_shape, need_dy, need_dgate):
    bwd = cuda_host.op("gated_residual_bwd")
    dout, y, gate = torch.randn(3, 5, 17), torch.randn(3, 5, 17), torch.randn(gate_shape)
    arguments = dout, y, gate, None, 0
    both = bwd(*arguments, True, True)
    dy, dgate = bwd(*arguments, need_dy, need_dgate)
    assert torch.equal(dy, both[0]) if need_dy else dy.shape == (0,)
    assert torch.equal(dgate, both[1]) if need_dgate else dgate.shape == (0,)
    launched = kernels_of(lambda: bwd(*arguments, need_dy, need_dgate))
    assert bool(launched) == (need_dy or need_dgate)


@pytest.mark.parametrize("form", [(1, 1, 1), (1, 1, 136), (2, 1, 136), (1, 300, 1), (2, 300, 1)])
def test_the_same_bits_every_time(form):
    dout, y, gate = torch.randn(2, 300, 136), torch.randn(2, 300, 136), torch.randn(form)
    bwd = cuda_host.op("gated_residual_bwd")
    same_bits_whatever_the_schedule(lambda: bwd(dout, y, gate, None, 0, True, True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", [(2, 1, 24), (2, 6, 24), (2, 6, 1)])
def test_what_a_masked_row_holds_is_not_read(form, value):
    """Neither the branch nor the incoming gradient, nor the row's own gate."""
    mask = torch.rand(2, 6) < 0.5
    mask[0, 0], mask[1, 1] = False, True
    x, y, dout = torch.randn(3, 2, 6, 24).unbind()
    gate = torch.randn(form)
    away = ~mask.unsqueeze(-1)
    bad_gate = gate.masked_fill(away, value) if form[1] == 6 else gate
    fwd, bwd = cuda_host.op("gated_residual_fwd"), cuda_host.op("gated_residual_bwd")
    good = (fwd(x, y, gate, mask, 0), *bwd(dout, y, gate, mask, 0, True, True))
    y, dout = y.masked_fill(away, value), dout.masked_fill(away, value)
    found = (fwd(x, y, bad_gate, mask, 0), *bwd(dout, y, bad_gate, mask, 0, True, True))
    for got, expected in zip(found, good, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(good[0][~mask], x[~mask])


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
def test_instances(dtype):
    """Every kernel of a storage dtype, for rows at multiples of 16 bytes and for others."""
    name = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    fwd, bwd = cuda_host.op("gated_residual_fwd"), cuda_host.op("gated_residual_bwd")
    found = set()
    for C, apart in ((24, 48), (33, 35)):
        x = torch.randn(2, 5, apart).to(dtype)[..., :C]
        for form in ((1, 1, C), (2, 5, 1), (2, 5, C)):
            gate = torch.randn(form).to(dtype)
            found.update(kernels_of(lambda x=x, gate=gate: fwd(x, x, gate, None, 0)))
            found.update(kernels_of(lambda x=x, g=gate: bwd(x, x, g, None, 0, True, True)))
    own = [one for one in found if "gated_residual" in one]
    assert len(own) == 8 and all(name in one for one in own), own
    for kernel in ("fwd", "bwd", "bwd_rows", "bwd_sums"):
        forms = [one for one in own if f"gated_residual_{kernel}_kernel" in one]
        assert any("true" in one for one in forms) and any("false" in one for one in forms), own


@pytest.mark.parametrize("shape", [(1, 1, 9), (2, 1, 9), (1, 5, 9)])
@pytest.mark.parametrize("form", [(1, 1, 9), (2, 5, 1), (2, 5, 9)])
def test_incoming_gradient_of_a_sum(shape, form):
    """Expanded: some of its strides are 0."""
    y, gate, dout = torch.randn(2, 5, 9), torch.randn(form), torch.randn(shape).expand(2, 5, 9)
    bwd = cuda_host.op("gated_residual_bwd")
    found = bwd(dout, y, gate, None, 0, True, True)
    expected = bwd(dout.contiguous(), y, gate, None, 0, True, True)
    torch.testing.assert_close(found, expected)


def test_gate_whose_channels_lie_apart():
    x, y, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8, 3, 2).permute(2, 1, 0)
    out = cuda_host.op("gated_residual_fwd")(x, y, gate, None, 2)
    torch.testing.assert_close(out, x + gate * y)
    dy, dgate = cuda_host.op("gated_residual_bwd")(x, y, gate, None, 2, True, True)
    torch.testing.assert_close((dy, dgate), (x * gate, x * y))


def test_offsets_beyond_32_bits():
    apart = 2**31 + 8
    memory = torch.UntypedStorage(2 * (apart + 64))  # never touched but for two rows
    far = torch.empty(0, dtype=torch.float16).set_(memory, 0, (2, 2, 8), (apart, 16, 1))
    far.copy_(torch.randn(2, 2, 8))
    out = cuda_host.op("gated_residual_fwd")(far, far, torch.ones(1, 1, 1), None, 2)
    assert torch.equal(out, 2 * far)
    dy, dgate = cuda_host.op("gated_residual_bwd")(
        far, far, torch.ones(1, 1, 8), None, 2, True, True
    )
    assert torch.equal(dy, far)
    torch.testing.assert_close(dgate, far.float().square().sum((0, 1), keepdim=True))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: (x, x[:, :2], x[:1, :1], None, 0), "data must have one shape"),
        (lambda x: (x, x.half(), x[:1, :1], None, 0), "one dtype"),
        (lambda x: (x, x, x[:1, :2], None, 0), "gate must be"),
        (lambda x: (x, x, x[:1, :1].half(), None, 0), "gate must have the dtype"),
        (lambda x: (x, x, x[:1, :1], x[..., 0], 0), "row_mask must be bool"),
        (lambda x: (x, x, x[:1, :1], None, 3), "no such activation"),
        (lambda x: (x.mT, x.mT, x[:1, :1, :1], None, 0), "must be dense"),
    ],
)
def test_what_would_be_unsafe_is_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        cuda_host.op("gated_residual_fwd")(*call(torch.randn(2, 3, 8)))
