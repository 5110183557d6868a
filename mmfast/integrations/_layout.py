"""Where the tokens of a padded batch `[B, L]` are, and moving rows there and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.nn._tokens import put_rows, take_rows


class Layout:
    """The valid tokens of `[B, L]` one after the other.

    Attributes: `batch`, `length` (L), `total` (T, all tokens), `cu_seqlens` (int32 `[B + 1]`),
    `lens` (int32 `[B]`), `min_len`, `max_len`, `index` (int64 `[T]`, rows of the flattened batch),
    `holes` (some item's padding is not all on the right), all known on the host but the tensors.
    """

    def __init__(self, index: Tensor, lens: Tensor, batch: int, length: int, holes: bool) -> None:
        self.index = index
        self.batch, self.length = batch, length
        self.total = index.shape[0]
        self.lens = lens
        self.min_len, self.max_len = (int(n) for n in lens.aminmax()) if batch else (0, 0)
        self.cu_seqlens = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
        self.holes = holes

    @classmethod
    def of(cls, valid: Tensor) -> Layout:
        """Of a bool `[B, L]`, True = token. Waits for an accelerator."""
        holes = bool((valid[:, 1:] & ~valid[:, :-1]).any())
        index = valid.reshape(-1).nonzero().squeeze(1)
        batch, length = valid.shape
        return cls(index, valid.sum(1, dtype=torch.int32), batch, length, holes)

    @classmethod
    def whole(cls, batch: int, length: int, device: torch.device) -> Layout:
        """Of a batch without padding."""
        index = torch.arange(batch * length, device=device)
        lens = torch.full((batch,), length, dtype=torch.int32, device=device)
        return cls(index, lens, batch, length, holes=False)

    def valid(self) -> Tensor:
        """bool `[B, L]`, True = token."""
        flat = torch.zeros(
            self.batch * self.length, dtype=torch.bool, device=self.index.device
        ).index_fill_(0, self.index, True)
        return flat.unflatten(0, (self.batch, self.length))

    @property
    def valid_share(self) -> float:
        """Share of the rows that are tokens."""
        return self.total / max(1, self.batch * self.length)

    def pack(self, rows: Any) -> Any:
        """`[B, L, ...]` -> `[1, T, ...]`; `[1, L, ...]` is repeated; tuples item by item."""
        if isinstance(rows, tuple | list):
            return type(rows)(self.pack(of) for of in rows)
        if rows is None:
            return None
        if rows.shape[0] != self.batch:
            rows = rows.expand(self.batch, *rows.shape[1:])
        return take_rows(rows.flatten(0, 1), self.index).unsqueeze(0)

    def unpack(self, rows: Tensor) -> Tensor:
        """What a layer hands on: `padded` rows. (Tests count layers by this.)"""
        return self.padded(rows)

    def padded(self, rows: Tensor) -> Tensor:
        """`[1, T, ...]` -> `[B, L, ...]` with zeros in padding."""
        flat = put_rows(rows.squeeze(0), self.index, self.batch * self.length)
        return flat.unflatten(0, (self.batch, self.length))
