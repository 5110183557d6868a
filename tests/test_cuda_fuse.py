"""The CUDA kernels of fuse, executed on the CPU."""

from __future__ import annotations

import cuda_host
import pytest
import torch
from cuda_gates import check_case, same_bits_whatever_the_schedule
from cuda_host import (
    host,  # noqa: F401
    kernels_of,
)

import mmfast
from mmfast.testing.gate_cases import GateCase

pytestmark = pytest.mark.usefixtures("host")

MODES = ("softmax", "sigmoid", "gmu")


def _case(shape, K, mode, form, **more):
    sides = (("logits", form),)
    return GateCase("fuse", f"own_{mode}_{form}", shape, K=K, mode=mode, sides=sides, **more)


@pytest.mark.parametrize("name, dtype", cuda_host.gate_cases("fuse"))
def test_case(name, dtype):
    cuda_host.check_gate(name, dtype)


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
@pytest.mark.parametrize("form", ["K", "BK", "BNK", "1NK", "BNKC", "1NKC", "B1KC", "11K1"])
@pytest.mark.parametrize("mode", MODES)
def test_wide(mode, form, dtype):
    """Rows that begin at multiples of 16 bytes, which the registry's mostly do not."""
    check_case(_case((3, 7, 72), 3, mode, form, present="random"), dtype)


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
@pytest.mark.parametrize("form", ["BNC", "BN1", "1NC", "B1C"])
def test_wide_pair(form, dtype):
    more = {} if dtype == torch.float32 else {"side_dtype": "float32"}
    check_case(_case((3, 7, 72), 2, "gmu", form, present="random", **more), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["K", "BK", "1NK", "1NKC", "B1KC"])
def test_large_sums(form, dtype):
    """Several blocks for each sum, more modalities than a block takes at a time."""
    shape = (300, 5, 72) if "N" in form else (2, 300, 72)
    check_case(_case(shape, 6, "softmax", form, present="random"), dtype)


@pytest.mark.parametrize("form", ["BNK", "BNKC", "K", "B1KC"])
@pytest.mark.parametrize("mode", MODES)
def test_64_modalities(mode, form):
    check_case(_case((3, 5, 24), 64, mode, form, present="random"), torch.float32)


def test_65_modalities():
    x = torch.randn(1, 1, 4)
    fwd = cuda_host.op("fuse_fwd")
    with pytest.raises(RuntimeError, match="take 1 to 64 modalities"):
        fwd([x] * 65, torch.zeros(1, 1, 65, 1), None, 0)
    with pytest.raises(RuntimeError, match="take 1 to 64 modalities"):
        fwd([], torch.zeros(1, 1, 0, 1), None, 0)
    with pytest.raises(RuntimeError, match="cuda: K=65: up to 64 modalities are fused here"):
        mmfast.fuse([x] * 65, torch.zeros(65), mode="softmax")


@pytest.mark.parametrize("C", [8, 100, 257, 520, 2056])
@pytest.mark.parametrize("K", [2, 5, 33])
def test_teams_of_a_row(C, K):
    """Lanes of part of a warp, of several warps, of the whole block; tables of few and many."""
    check_case(_case((2, 3, C), K, "softmax", "BNK", present="random"), torch.bfloat16)


@pytest.mark.parametrize("form", [(1, 1, 3, 1), (2, 5, 3, 9), (1, 5, 3, 9), (2, 5, 3, 1)])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_only_what_is_needed(form, mode):
    bwd = cuda_host.op("fuse_bwd")
    dout, features = torch.randn(2, 5, 9), [torch.randn(2, 5, 9) for _ in range(3)]
    arguments = dout, features, torch.randn(form), None, mode
    dx, dlogits = bwd(*arguments, True, True)
    some, none = bwd(*arguments, True, False)
    assert none.shape == (0,) and all(torch.equal(a, b) for a, b in zip(dx, some, strict=True))
    empty, again = bwd(*arguments, False, True)
    assert empty == [] and torch.equal(again, dlogits)
    launched = kernels_of(lambda: bwd(*arguments, False, False))
    assert launched == []


@pytest.mark.parametrize("form", [(1, 1, 5, 1), (2, 1, 5, 1), (1, 1, 5, 72), (1, 200, 5, 72)])
def test_the_same_bits_every_time(form):
    dout, features = torch.randn(2, 200, 72), [torch.randn(2, 200, 72) for _ in range(5)]
    logits, bwd = torch.randn(form), cuda_host.op("fuse_bwd")
    same_bits_whatever_the_schedule(lambda: bwd(dout, features, logits, None, 0, True, True))


@pytest.mark.parametrize("form", [(1, 1, 3, 1), (2, 5, 3, 9)])
def test_incoming_gradient_of_a_sum(form):
    """Expanded: its strides are 0."""
    dout, features = torch.randn(9).expand(2, 5, 9), [torch.randn(2, 5, 9) for _ in range(3)]
    arguments = features, torch.randn(form), None, 0, True, True
    bwd = cuda_host.op("fuse_bwd")
    dx, dlogits = bwd(dout, *arguments)
    expected, dlogits_expected = bwd(dout.contiguous(), *arguments)
    torch.testing.assert_close([*dx, dlogits], [*expected, dlogits_expected])


@pytest.mark.parametrize("dtype", cuda_host.DTYPES)
def test_instances(dtype):
    """Every kernel of a storage dtype, for rows at multiples of 16 bytes and for others."""
    name = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    fwd, bwd = cuda_host.op("fuse_fwd"), cuda_host.op("fuse_bwd")
    found = set()
    for C in (24, 33):
        x = [torch.randn(2, 5, C).to(dtype) for _ in range(2)]
        for form in ((2, 5, 2, 1), (2, 5, 2, C), (1, 1, 2, C)):
            logits = torch.randn(form).to(dtype)
            found.update(kernels_of(lambda x=x, logits=logits: fwd(x, logits, None, 0)))
            call = lambda x=x, logits=logits: bwd(x[0], x, logits, None, 0, True, True)  # noqa: E731
            found.update(kernels_of(call))
    own = [one for one in found if "fuse" in one]
    assert len(own) == 10 and all(name in one for one in own), own
    for kernel in ("fwd_rows", "fwd_channels", "bwd_rows", "bwd_channels"):
        forms = [one for one in own if f"fuse_{kernel}_kernel" in one]
        assert len(forms) == (4 if kernel == "bwd_channels" else 2), own


def test_offsets_beyond_32_bits():
    apart = 2**31 + 8
    memory = torch.UntypedStorage(2 * (apart + 64))  # never touched but for two rows
    far = torch.empty(0, dtype=torch.float16).set_(memory, 0, (2, 2, 8), (apart, 16, 1))
    far.copy_(torch.randn(2, 2, 8))
    out = cuda_host.op("fuse_fwd")([far, far], torch.zeros(1, 1, 2, 1), None, 0)
    assert torch.equal(out, far)
    dx, _ = cuda_host.op("fuse_bwd")(far, [far, far], torch.zeros(1, 1, 2, 1), None, 0, True, False)
    assert torch.equal(dx[0], far / 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(1, 1, 3, 1)}, "logits must be"),
        ({"logits": torch.zeros(1, 1, 2, 1).half()}, "logits have the dtype"),
        ({"present": torch.ones(2, 2)}, "present must be contiguous bool"),
        ({"present": torch.ones(3, 2, dtype=torch.bool)}, "present must be contiguous bool"),
        ({"mode": 4}, "no such mode"),
        ({"features": [torch.randn(2, 3, 8), torch.randn(2, 3, 9)]}, "must have one shape"),
    ],
)
def test_what_would_be_unsafe_is_refused(change, message):
    arguments = {
        "features": [torch.randn(2, 3, 8)] * 2,
        "logits": torch.zeros(1, 1, 2, 1),
        "present": None,
        "mode": 0,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        cuda_host.op("fuse_fwd")(**arguments)
