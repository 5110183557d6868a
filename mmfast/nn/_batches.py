"""What goes into an encoder: how many items it has, some of its items, items blanked out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfast.nn.packed_tokens import PackedTokens


def batch_of(value: Any) -> int | None:
    """The number of items of an encoder's input; None where it cannot be seen."""
    if isinstance(value, PackedTokens):
        return value.batch
    if isinstance(value, Tensor):
        return value.shape[0] if value.is_nested or value.dim() > 0 else None
    if isinstance(value, Mapping):
        sizes = (batch_of(part) for part in value.values())
        return next((size for size in sizes if size is not None), None)
    if isinstance(value, list):
        return len(value)
    if isinstance(value, tuple) and len(value) > 0:
        return batch_of(value[0])
    return None


def none_items(value: Any) -> list[bool] | None:
    """Which items of a list are there, where some are None; else None."""
    if isinstance(value, list) and any(item is None for item in value):
        return [item is not None for item in value]
    return None


def can_pick(value: Any, batch: int) -> bool:
    """Can items be taken out of it? True where all that it holds has one entry an item."""
    if isinstance(value, Tensor):
        return not value.is_nested and value.dim() > 0 and value.shape[0] == batch
    if isinstance(value, Mapping):
        return all(not isinstance(v, Tensor | list) or can_pick(v, batch) for v in value.values())
    if isinstance(value, tuple):
        return len(value) > 0 and all(can_pick(part, batch) for part in value)
    return isinstance(value, list) and len(value) == batch


def pick(value: Any, items: Tensor) -> Any:
    """Only these items of what `can_pick`."""
    if isinstance(value, Tensor):
        return value.index_select(0, items.to(value.device))
    if isinstance(value, Mapping):
        return {name: pick(part, items) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(pick(part, items) for part in value)
    if isinstance(value, list):
        return [value[b] for b in items.tolist()]
    return value  # an option beside the data


def blank(value: Any, present: Tensor) -> Any:
    """With zeros for the items for which `present` `[B]` is False: they may be NaN, and a NaN
    inside an encoder would reach its weights though nothing uses its result.
    """
    if isinstance(value, Tensor):
        if value.is_nested or value.shape[:1] != present.shape or not value.is_floating_point():
            return value
        absent = present.to(value.device).logical_not()
        return torch.where(absent.view(-1, *(1,) * (value.dim() - 1)), 0.0, value)
    if isinstance(value, Mapping):
        return {name: blank(part, present) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(blank(part, present) for part in value)
    return value
