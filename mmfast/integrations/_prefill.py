"""Filling an empty cache from rows that come without padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmfast.integrations._layout import Layout
from mmfast.nn._tokens import put_rows


class Prefill:
    """Stands in for an empty cache in a layer whose rows are packed.

    The cache gets keys and values `[B, G, L, D]` as ever, with zeros where padding was: the masks
    of later steps leave these out. The layer goes on with the packed ones.
    """

    def __init__(self, cache: Any, layout: Layout) -> None:
        self._cache, self._layout = cache, layout

    @staticmethod
    def takes(cache: Any) -> bool:
        """Whether a layer may be run on packed rows with this cache; it must hold nothing yet.

        The mask of a layer with as many keys as rows says that: see `padding_of`.
        """
        if cache is None:
            return True
        of = type(cache)
        return of.__name__ == "DynamicCache" and of.__module__ == "transformers.cache_utils"

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """`[1, G, T, D]` into the cache of a layer, and back as they are."""
        self._cache.update(self._padded(keys), self._padded(values), layer_idx, *args, **kwargs)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How much the cache holds: nothing, before `update`."""
        length: int = self._cache.get_seq_length(layer_idx)
        return length

    def _padded(self, packed: Tensor) -> Tensor:
        batch, length = self._layout.batch, self._layout.length
        rows = packed.transpose(1, 2).squeeze(0)
        padded = put_rows(rows, self._layout.index, batch * length)
        return padded.unflatten(0, (batch, length)).transpose(1, 2)
