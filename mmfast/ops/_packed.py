"""Packed rows of `cross_attention`: where items begin, how long they are, how long the longest is.

Items of a packed tensor lie one after the other along its rows; `cu_seqlens` `[B + 1]` holds their
cumulative lengths from 0 on, as in FlashAttention's "varlen" functions and in `torch.nested`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.ops import _checks

_OP = "cross_attention"

MAX_LEN_MESSAGE = (
    f"{_OP}: max_q_len and max_kv_len go with q_cu_seqlens and kv_cu_seqlens; without them the "
    f"lengths are those of q and k: drop it"
)


class Packing(NamedTuple):
    """`starts` int32 `[B + 1]`, `lens` int32 `[B]`, `longest`: what stands for N or M."""

    starts: Tensor
    lens: Tensor
    longest: int

    @property
    def batch(self) -> int:
        """The number of items."""
        return self.lens.shape[0]


def packing(
    side: str, cu_seqlens: Any, longest: int | None, lens: Any, rows: int, q: Tensor, eager: bool
) -> Packing:
    """The checked `Packing` of one side, "q" or "kv", of a tensor with `rows` rows in all."""
    name = f"{side}_cu_seqlens"
    if lens is not None:
        raise ValueError(
            f"{_OP}: {side}_lens and {name} are both given; packed rows have no padding, so that "
            f"{name} says how long each item is; drop {side}_lens"
        )
    _checks.require_tensor(_OP, name, cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{_OP}: {name} has shape {_checks.shape_text(cu_seqlens)}, expected [B + 1]; "
            f"it holds 0 and the cumulative lengths of the items"
        )
    _checks.require_integer(_OP, name, cu_seqlens, (cu_seqlens.shape[0],), q)
    if longest is not None and not isinstance(longest, int):
        raise TypeError(
            f"{_OP}: max_{side}_len must be a Python int or None, got {type(longest).__name__}; "
            f"read it from the tensor once with int()"
        )
    if eager and cu_seqlens.is_cpu:
        return _read(side, name, cu_seqlens, longest, rows)
    if eager:  # no synchronisation: no row outside the tensor is read, whatever the values
        starts = cu_seqlens.to(torch.int32, memory_format=torch.contiguous_format).clamp(0, rows)
    else:
        starts = torch.ops.mmfast.checked_int32(cu_seqlens, 0, rows, _OP, name)
    lens = (starts[1:] - starts[:-1]).clamp(min=0)
    return Packing(starts, lens, rows if longest is None else longest)


def _read(side: str, name: str, cu_seqlens: Tensor, longest: int | None, rows: int) -> Packing:
    starts = _checks.checked_int32(_OP, name, cu_seqlens, 0, rows)
    values = starts.tolist()
    lengths = [end - begin for begin, end in pairwise(values)]
    if lengths and min(lengths) < 0:
        at = lengths.index(min(lengths))
        raise ValueError(
            f"{_OP}: {name} falls from {values[at]} to {values[at + 1]} at position {at + 1}; "
            f"cumulative lengths never fall: take torch.cumsum of the lengths, with a 0 before it"
        )
    most = max(lengths, default=0)
    if longest is not None and most > longest:
        raise ValueError(
            f"{_OP}: max_{side}_len is {longest} but {name} has an item of length {most}; "
            f"give the largest length, or None on the CPU"
        )
    lens = torch.tensor(lengths, dtype=torch.int32)
    return Packing(starts, lens, most if longest is None else longest)


def require_packed(name: str, tensor: Tensor, shape: str) -> None:
    """ValueError unless a packed tensor has 3 dims."""
    if tensor.dim() != 3:
        raise ValueError(
            f"{_OP}: {name} has {tensor.dim()} dims (shape {_checks.shape_text(tensor)}), expected "
            f"{shape} beside cumulative lengths; put the rows of all items one after the other"
        )


def padded_gate(gate: Any, rows: int) -> Any:
    """A gate `[Tq, H]` or `[Tq, H, Dv]` of packed rows with a batch dim before it."""
    _checks.require_tensor(_OP, "gate", gate)
    if gate.dim() not in (2, 3) or gate.shape[0] != rows:
        raise ValueError(
            f"{_OP}: gate has shape {_checks.shape_text(gate)}, expected [Tq, H] or [Tq, H, Dv] "
            f"with Tq={rows} beside q_cu_seqlens; it holds logits for each packed row"
        )
    return gate.unsqueeze(0)


def batch_of(
    q_packing: Packing | None, kv_packing: Packing | None, q: Tensor, k: Tensor
) -> tuple[int, int]:
    """The size of k's first dim, and the number of items, checked."""
    batch = q_packing.batch if q_packing is not None else q.shape[0]
    keys = kv_packing.batch if kv_packing is not None else k.shape[0]
    if batch != keys:
        told = "q_cu_seqlens" if q_packing is not None else "q"
        others = "kv_cu_seqlens" if kv_packing is not None else "k"
        raise ValueError(
            f"{_OP}: {others} has B={keys} items but {told} has B={batch}; both must match; an "
            f"item without keys has the length 0"
        )
    return (1 if kv_packing is not None else batch), batch
