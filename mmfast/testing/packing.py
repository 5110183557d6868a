"""The packed form of padded problems: every case of the registry is a case of it as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

SIDES = (("q",), ("kv",), ("q", "kv"))
"""What can be packed."""

_BEFORE, _AFTER = 2, 3  # rows of no item, all NaN, before the first item and past the last


def packed(function: Callable[..., Any], sides: Sequence[str] = ("q", "kv")) -> Callable[..., Any]:
    """`function`, which takes packed rows, as one that takes padded ones, `cross_attention`'s.

    What it is given is packed, with rows of NaN around the items, and what it returns is padded
    again. Both are differentiable: gradients are those of the padded tensors.
    """

    def call(q: Tensor, k: Tensor, v: Tensor | None, **options: Any) -> Any:
        rows = None
        if "kv" in sides:
            lens = options.pop("kv_lens", None)
            keys = _Rows(k, lens)
            k, v = keys.pack(k), None if v is None else keys.pack(v)
            options |= {"kv_cu_seqlens": keys.cu_seqlens, "max_kv_len": keys.length}
        if "q" in sides:
            rows = _Rows(q, options.pop("q_lens", None))
            q = rows.pack(q)
            options |= {"q_cu_seqlens": rows.cu_seqlens, "max_q_len": rows.length}
            if options.get("gate") is not None:
                options["gate"] = rows.pack(options["gate"].transpose(1, 2)).transpose(0, 1)
        result = function(q, k, v, **options)
        if rows is None:
            return result
        if isinstance(result, Tensor):
            return rows.pad(result)
        return result._replace(out=rows.pad(result.out))

    return call


class _Rows:
    """Where the rows of each item are, in `[B, H, L, ...]` and one after the other."""

    def __init__(self, padded: Tensor, lens: Tensor | None) -> None:
        self.batch, self.length = padded.shape[0], padded.shape[2]
        counts = [self.length] * self.batch if lens is None else lens.tolist()
        ends = list(accumulate(counts, initial=_BEFORE))
        self.cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=padded.device)
        there = torch.arange(self.length) < torch.tensor(counts, dtype=torch.long)[:, None]
        self.index = there.flatten().nonzero().squeeze(1).to(padded.device)

    def pack(self, padded: Tensor) -> Tensor:
        """`[B, H, L, ...]` -> `[H, rows, ...]`; the memory keeps the order of heads and rows."""
        flat = padded.transpose(1, 2).reshape(-1, padded.shape[1], *padded.shape[3:])
        before, after = (flat.new_full((n, *flat.shape[1:]), torch.nan) for n in (_BEFORE, _AFTER))
        rows = torch.cat([before, flat[self.index], after]).transpose(0, 1)
        return rows if padded.stride(1) < padded.stride(2) else rows.contiguous()

    def pad(self, packed: Tensor) -> Tensor:
        """`[H, rows, D]` -> `[B, H, L, D]`; rows of no item must be 0."""
        ahead, behind = packed[:, :_BEFORE], packed[:, packed.shape[1] - _AFTER :]
        assert not ahead.any() and not behind.any(), "rows of no item are not 0"
        rows = packed.transpose(0, 1)[_BEFORE : packed.shape[1] - _AFTER]
        full = rows.new_zeros(self.batch * self.length, *rows.shape[1:])
        full = full.index_copy(0, self.index, rows)
        return full.view(self.batch, self.length, *rows.shape[1:]).transpose(1, 2)
