"""GLU in Triton, interpreted under the guard."""

from __future__ import annotations

import pytest
import torch
from triton_helpers import check_case, interpreted, requires_triton, triton_cases  # noqa: F401

pytestmark = [requires_triton, pytest.mark.usefixtures("interpreted")]


@pytest.mark.parametrize("name, dtype", triton_cases("glu", "glu_packed"))
def test_case(name, dtype):
    check_case(name, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 9), (2, 1, 9), (1, 5, 9)])
def test_incoming_gradient_of_a_sum(shape):
    """Expanded: some of its strides are 0."""
    from mmfast.kernels import glu

    a, b, dout = torch.randn(2, 5, 9), torch.randn(2, 5, 9), torch.randn(shape).expand(2, 5, 9)
    for got, expected in zip(
        glu.glu_bwd(dout, a, b, 4), glu.glu_bwd(dout.contiguous(), a, b, 4), strict=True
    ):
        assert torch.equal(got, expected)
