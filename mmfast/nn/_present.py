"""Modalities that an item, or a row, does not have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.nn._tokens import readable


def presence(
    present: Tensor | None, given: Sequence[bool], leading: Sequence[int], device: torch.device
) -> Tensor | None:
    """`present` with the modalities for which no tensor was given set to False; None: all there.

    All there is only noticed where looking costs nothing.
    """
    if present is not None and readable(present) and bool(present.all()):
        present = None
    if all(given):
        return present
    mask = torch.tensor(given, device=device)
    if present is None:
        return mask.expand(leading[0] if len(leading) else 1, len(given))
    return present & mask


def rows_of(present: Tensor, index: int, dims: int) -> Tensor:
    """Which rows have modality `index`: bool that broadcasts to the rows of a `dims`-D tensor."""
    there = present[..., index]
    return there.view(*there.shape, *(1,) * (dims - 1 - there.dim()))


def absent_to_zero(x: Tensor, present: Tensor | None, index: int) -> Tensor:
    """x with exact zeros, and exactly zero gradients, in rows that do not have modality `index`.

    Before any product: a missing modality may be NaN, and 0 * NaN is NaN.
    """
    if present is None:
        return x
    return x.masked_fill(rows_of(present, index, x.dim()).logical_not().unsqueeze(-1), 0.0)
