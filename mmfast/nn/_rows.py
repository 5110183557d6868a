"""Rows of queries in the order of memory, and back to the padded form of statistics.

Rows are `[B, N, ...]`, `[N, B, ...]` (`seq_first`) or packed `[T, ...]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.nn._streams import Source
from mmfast.nn.packed_tokens import PackedTokens
from mmfast.nn.projected_context import ProjectedContext

# Orders of dims, for rows [B, N, ...] and for [N, B, ...] (seq_first).
ROWS_TO_OP = ((0, 2, 1, 3), (1, 2, 0, 3))  # [B, N, H, D] -> [B, H, N, D]
OP_TO_ROWS = ((0, 2, 1, 3), (2, 0, 1, 3))
ABSORBED_TO_OP = ((1, 0, 2, 3), (2, 0, 1, 3))  # [H, B, N, C] -> [B, H, N, C]
OP_TO_ABSORBED = ((1, 0, 2, 3), (1, 2, 0, 3))


def to_rows(padded: Tensor, packed: PackedTokens | None, seq_first: bool = False) -> Tensor:
    """`[..., B, N]` in the order of the rows: `[..., B, N]`, `[..., N, B]` or packed `[..., T]`."""
    if packed is None:
        return padded.transpose(-1, -2) if seq_first else padded
    flat = padded.flatten(-2)
    index = packed.padded_index(packed.length)
    return flat if index is None else flat.index_select(-1, index)


def gated(attended: Tensor, gate: Tensor) -> Tensor:
    """sigmoid(gate) `[..., H]` or `[..., H, Dv]` times attended `[..., H, Dv]`."""
    gate = gate if gate.dim() == attended.dim() else gate.unsqueeze(-1)
    wide = torch.promote_types(attended.dtype, torch.float32)
    return (attended * torch.sigmoid(gate.to(wide))).to(attended.dtype)


def to_padded(rows: Tensor, packed: PackedTokens | None, seq_first: bool) -> Tensor:
    """`[B, N, H]`, `[N, B, H]` or packed `[T, H]` -> `[B, H, N]`."""
    if packed is not None:
        rows = packed.with_values(rows).to_padded()
    return rows.permute((1, 2, 0) if seq_first else (0, 2, 1))


def without_dead(
    rows: Tensor,
    source: Source | ProjectedContext,
    lse: Tensor | None,
    packed: PackedTokens | None,
    seq_first: bool,
) -> Tensor:
    """rows with exact zeros where there is nothing to attend: by the lse, or by the lengths."""
    if lse is not None:
        dead = to_rows((lse == -torch.inf).all(dim=1), packed, seq_first)
    else:
        lens = source.lens
        if isinstance(source, ProjectedContext):
            lens = source.item_lens()
        if lens is None:
            return rows
        empty = lens == 0
        if packed is not None:
            dead = empty[packed.items]
        else:
            dead = empty.unsqueeze(0) if seq_first else empty.unsqueeze(1)
    return rows.masked_fill(dead.unsqueeze(-1), 0.0)
