"""fuse in Triton, interpreted under the guard."""

from __future__ import annotations

import pytest
import torch
from triton_helpers import check_case, interpreted, requires_triton, triton_cases  # noqa: F401

pytestmark = [requires_triton, pytest.mark.usefixtures("interpreted")]


@pytest.mark.parametrize("name, dtype", triton_cases("fuse"))
def test_case(name, dtype):
    check_case(name, dtype)


@pytest.mark.parametrize("form", [(1, 1, 3, 1), (2, 5, 3, 9), (1, 5, 3, 9)])
def test_only_what_is_needed(form):
    from mmfast.kernels.fuse_bwd import fuse_bwd

    dout, features = torch.randn(2, 5, 9), [torch.randn(2, 5, 9) for _ in range(3)]
    logits = torch.randn(form)
    dx, dlogits = fuse_bwd(dout, features, logits, None, 0, True, True)
    some, none = fuse_bwd(dout, features, logits, None, 0, True, False)
    assert none.shape == (0,) and all(torch.equal(a, b) for a, b in zip(dx, some, strict=True))
    empty, again = fuse_bwd(dout, features, logits, None, 0, False, True)
    assert empty == [] and torch.equal(again, dlogits)


def test_too_many_features():
    from mmfast.kernels.fuse import MAX_FEATURES, fuse_fwd

    x, count = torch.randn(1, 1, 4), MAX_FEATURES + 1
    with pytest.raises(ValueError, match="fuse: 65 features, the Triton kernels take up to 64"):
        fuse_fwd([x] * count, torch.zeros(1, 1, count, 1), None, 0)


@pytest.mark.parametrize("form", [(1, 1, 3, 1), (2, 5, 3, 9)])
def test_incoming_gradient_of_a_sum(form):
    """Expanded: its strides are 0."""
    from mmfast.kernels.fuse_bwd import fuse_bwd

    dout, features = torch.randn(9).expand(2, 5, 9), [torch.randn(2, 5, 9) for _ in range(3)]
    arguments = features, torch.randn(form), None, 0, True, True
    dx, dlogits = fuse_bwd(dout, *arguments)
    expected, dlogits_expected = fuse_bwd(dout.contiguous(), *arguments)
    torch.testing.assert_close([*dx, dlogits], [*expected, dlogits_expected])
