"""The meaning of `glu` and `glu_packed` in plain torch: every backend must agree with this file."""

from __future__ import annotations

from torch import Tensor

from mmfast.reference._compute import compute_dtype, full_precision
from mmfast.reference.activations import GLU_ACTIVATIONS


def glu(a: Tensor, b: Tensor, activation: str = "silu") -> Tensor:
    """`act(a) * b`, computed in float32 and rounded once.

    The arguments are those of `mmfast.glu`, which documents and checks them; here they are taken on
    trust.
    """
    with full_precision(a):
        acc = compute_dtype(a)
        return (GLU_ACTIVATIONS[activation](a.to(acc)) * b.to(acc)).to(a.dtype)


def glu_packed(ab: Tensor, activation: str = "silu") -> Tensor:
    """`glu(a, b)` of the two halves of the last dim, a first."""
    a, b = ab.chunk(2, dim=-1)
    return glu(a, b, activation)
