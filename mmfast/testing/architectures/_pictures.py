"""Batches of pictures of different sizes, padded at the right and at the bottom."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def padded_pictures(height: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """Three pictures, on the mean 60 % of whose pixels are valid: `pixel_values`, `pixel_mask`.

    The mask is `[3, height, width]` int64, 1 = pixel; padding is 0 in the values, as the image
    processors leave it. Flattened, padding is at the end of every line, not of the sequence.
    """
    shares = ((1.0, 1.0), (0.75, 2 / 3), (0.5, 0.6))
    mask = torch.zeros(len(shares), height, width, dtype=torch.long)
    for item, (high, wide) in zip(mask, shares, strict=True):
        item[: round(high * height), : round(wide * width)] = 1
    return {"pixel_values": pictures(3, height, width, seed) * mask[:, None], "pixel_mask": mask}


def pictures(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """`[batch, 3, height, width]` float32, normal.

    Faint: the batch norms of a new backbone do not normalise, and the scores of an attention that
    is given its features would be in the thousands.
    """
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(batch, 3, height, width, generator=generator)


def named(result: Any, *names: str) -> dict[str, Tensor]:
    """Those fields of a model's output."""
    return {name: getattr(result, name) for name in names}
