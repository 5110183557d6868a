"""The CUDA kernels of glu and glu_packed, executed on the CPU."""

from __future__ import annotations

import cuda_host
import pytest
import torch
from cuda_gates import check_case
from cuda_host import (
    host,  # noqa: F401
    kernels_of,
)

from mmfast.reference.activations import GLU_ACTIVATIONS
from mmfast.testing.gate_cases import GateCase

pytestmark = pytest.mark.usefixtures("host")


@pytest.mark.parametrize("name, dtype", cuda_host.gate_cases("glu", "glu_packed"))
def test_case(name, dtype):
    cuda_host.check_gate(name, dtype)


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
@pytest.mark.parametrize("activation", GLU_ACTIVATIONS)
def test_wide(activation, dtype):
    """Rows of whole accesses that lie apart, several blocks of them, and an end that is shorter."""
    check_case(GateCase("glu_packed", "wide", (2, 70, 72), activation), dtype)
    check_case(GateCase("glu", "sliced", (3, 9, 520), activation, layout="sliced"), dtype)


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
def test_instances(dtype):
    """Accesses of 16 bytes wherever rows begin at multiples, whatever their length."""
    name = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    memory = torch.randn(3, 5, 40).to(dtype)
    a, b = memory[..., :33], torch.randn(3, 5, 40).to(dtype)[..., :33]
    whole = torch.randn(3, 7, 11).to(dtype)  # one row of 231 elements
    shifted = torch.randn(3 * 5 * 32 + 1).to(dtype)[1:].view(3, 5, 32)
    fwd, bwd = cuda_host.op("glu_fwd"), cuda_host.op("glu_bwd")
    for x, y, wide in ((a, b, False), (whole, whole, True), (shifted, shifted, False)):
        found = kernels_of(lambda x=x, y=y: (fwd(x, y, 0), bwd(x.contiguous(), x, y, 0)))
        form = "true" if wide else "false"
        assert [one.split("<")[0].split("::")[-1] for one in found] == [
            "glu_fwd_kernel",
            "glu_bwd_kernel",
        ]
        for one in found:
            assert name in one and form in one, f"{one} for {tuple(x.shape)}, {x.stride()}"


@pytest.mark.parametrize("shape", [(1, 1, 9), (2, 1, 9), (1, 5, 9)])
def test_incoming_gradient_of_a_sum(shape):
    """Expanded: some of its strides are 0."""
    a, b, dout = torch.randn(2, 5, 9), torch.randn(2, 5, 9), torch.randn(shape).expand(2, 5, 9)
    bwd = cuda_host.op("glu_bwd")
    for got, expected in zip(bwd(dout, a, b, 4), bwd(dout.contiguous(), a, b, 4), strict=True):
        assert torch.equal(got, expected)


def test_halves_of_odd_width_are_read_where_they_are():
    """The second half begins at an odd element: 16-byte accesses are impossible."""
    ab = torch.randn(2, 3, 34).to(torch.bfloat16)
    found = kernels_of(lambda: cuda_host.op("glu_packed_fwd")(ab, 0))
    assert len(found) == 1 and "false" in found[0]


def test_results_lie_as_the_inputs_do():
    a = torch.randn(5, 3, 16).transpose(0, 1)
    assert cuda_host.op("glu_fwd")(a, a, 0).stride() == a.stride()
    ab = torch.randn(5, 3, 16).transpose(0, 1)
    out = cuda_host.op("glu_packed_fwd")(ab, 0)
    assert out.stride() == (8, 24, 1)
    assert cuda_host.op("glu_packed_bwd")(out, ab, 0).stride() == ab.stride()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a: cuda_host.op("glu_fwd")(a, a[:, :2], 0), "data must have one shape"),
        (lambda a: cuda_host.op("glu_fwd")(a, a.half(), 0), "one dtype"),
        (lambda a: cuda_host.op("glu_fwd")(a, a, 6), "no such activation"),
        (lambda a: cuda_host.op("glu_fwd")(a.double(), a.double(), 0), "float32, bfloat16"),
        (lambda a: cuda_host.op("glu_packed_fwd")(a[..., :7], 0), "must be even"),
        (lambda a: cuda_host.op("glu_fwd")(a.mT, a.mT, 0), "the last dim of data must be dense"),
    ],
)
def test_what_would_be_unsafe_is_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(2, 3, 8))
