"""The meaning of `gated_residual` in plain torch: every backend must agree with this file."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.reference._compute import channel_mask, compute_dtype, full_precision, per_item
from mmfast.reference.activations import GATE_ACTIVATIONS


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    activation: str = "tanh",
    row_mask: Tensor | None = None,
) -> Tensor:
    """`x + row_mask * act(gate) * y`, computed in float32 and rounded once.

    The arguments are those of `mmfast.gated_residual`, which documents and checks them; here they
    are taken on trust.
    """
    keep = channel_mask(row_mask)
    with full_precision(x):
        acc = compute_dtype(x)
        branch = y.to(acc)
        if keep is not None:  # before the product, so that no gradient is 0 * NaN
            branch = branch.masked_fill(~keep, 0.0)
        term = GATE_ACTIVATIONS[activation](per_item(gate, x).to(acc)) * branch
        if keep is not None:
            term = torch.where(keep, term, 0.0)
        return (x.to(acc) + term).to(x.dtype)
