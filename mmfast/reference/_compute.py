"""In which precision the references compute, and how side tensors line up with the data."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.promote_types(tensor.dtype, torch.float32)


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast: the caller has chosen the storage dtype, the sums stay in full precision."""
    device_type = tensor.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def per_item(side: Tensor, x: Tensor) -> Tensor:
    """`[B, C]` beside `[B, ..., C]` holds one row an item; everything else broadcasts as it is."""
    if side.dim() == 2 and x.dim() > 2:
        return side.reshape(side.shape[0], *(1,) * (x.dim() - 2), side.shape[1])
    return side


def channel_mask(row_mask: Tensor | None) -> Tensor | None:
    """`[...]` over rows -> `[..., 1]` over rows and channels."""
    return None if row_mask is None else row_mask.unsqueeze(-1)
