"""gated_residual in Triton, interpreted under the guard."""

from __future__ import annotations

import pytest
import torch
from triton_helpers import check_case, interpreted, requires_triton, triton_cases  # noqa: F401

pytestmark = [requires_triton, pytest.mark.usefixtures("interpreted")]


@pytest.mark.parametrize("name, dtype", triton_cases("gated_residual"))
def test_case(name, dtype):
    check_case(name, dtype)


@pytest.mark.parametrize("gate_shape", [(1, 1, 17), (3, 5, 17), (3, 5, 1)])
@pytest.mark.parametrize("need_dy, need_dgate", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(gate_shape, need_dy, need_dgate):
    from mmfast.kernels import gated_residual

    dout, y, gate = torch.randn(3, 5, 17), torch.randn(3, 5, 17), torch.randn(gate_shape)
    dy, dgate = gated_residual.gated_residual_bwd(dout, y, gate, None, 0, need_dy, need_dgate)
    both = gated_residual.gated_residual_bwd(dout, y, gate, None, 0, True, True)
    assert torch.equal(dy, both[0]) if need_dy else dy.shape == (0,)
    assert torch.equal(dgate, both[1]) if need_dgate else dgate.shape == (0,)


def test_gate_whose_channels_lie_apart():
    from mmfast.kernels import gated_residual

    x, y, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8, 3, 2).permute(2, 1, 0)
    out = gated_residual.gated_residual_fwd(x, y, gate, None, 2)
    torch.testing.assert_close(out, x + gate * y)


def test_offsets_beyond_32_bits():
    from mmfast.kernels import gated_residual

    apart = 2**31 + 8
    memory = torch.UntypedStorage(2 * (apart + 64))  # never touched but for two rows
    far = torch.empty(0, dtype=torch.float16).set_(memory, 0, (2, 2, 8), (apart, 16, 1))
    far.copy_(torch.randn(2, 2, 8))
    out = gated_residual.gated_residual_fwd(far, far, torch.ones(1, 1, 1), None, 2)
    assert torch.equal(out, 2 * far)


def test_layouts_that_are_one_row():
    """Dense tensors are walked as one long row, whatever their widths: accesses stay wide."""
    from mmfast.kernels._launch import layout

    assert layout((4, 6, 33), 4, [(198, 33)] * 3)[:4] == (1, 1, 198, 4)
    assert layout((4, 6, 33), 4, [(33, 132)] * 3)[:4] == (1, 1, 198, 4)
    assert layout((4, 6, 33), 4, [(198, 33)] * 2, [(6, 1)])[:4] == (1, 24, 33, 1)
    assert layout((4, 6, 32), 2, [(192, 32), (0, 0)])[:4] == (1, 24, 4, 8)
    assert layout((6, 4, 32), 2, [(128, 32), (0, 32)])[:4] == (4, 6, 4, 8)
    assert layout((4, 6, 32), 2, [(192, 32)], free=False)[:4] == (4, 6, 4, 8)
    assert layout((4, 6, 36), 2, [(216, 36), (220, 36)])[:4] == (4, 6, 9, 4)
