"""Filling an empty cache from rows that come without padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmfast.integrations._layout import Layout


class Prefill:
    """Stands in for an empty cache in a layer whose rows are packed.

    The cache gets keys and values `[B, G, L, D]` as ever, with zeros where padding was: the masks
    of later steps leave these out. The layer goes on with the packed ones.
    """

    def __init__(self, cache: Any, layout: Layout) -> None:
        self._cache, self._layout = cache, layout

    @staticmethod
    def takes(cache: Any, layer: nn.Module | None = None, context: bool = False) -> bool:
        """Whether a layer may be run on packed rows with this cache; it must hold nothing yet.

        Of rows: the mask of a layer with as many keys as rows says that, see `padding_of`. Of a
        `context`, where the layer attends to one: an `EncoderDecoderCache` says it.
        """
        if cache is None or _is(cache, "DynamicCache"):
            return cache is None or not context  # keys of two streams in one have no order
        if not _is(cache, "EncoderDecoderCache"):
            return False
        index = None if layer is None else layer_index(layer)
        return (
            _is(cache.self_attention_cache, "DynamicCache")
            and _is(cache.cross_attention_cache, "DynamicCache")
            and index is not None
            and not cache.is_updated.get(index)
        )

    @staticmethod
    def of(cache: Any, rows: Layout | None, context: Layout | None) -> Any:
        """What stands in for a cache; rows or context None: these are not packed."""
        if _is(cache, "EncoderDecoderCache"):
            return _Pair(cache, rows, context)
        return cache if rows is None else Prefill(cache, rows)

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
        return self._layout.padded(packed.transpose(1, 2)).transpose(1, 2)


class _Pair:
    """Stands in for an `EncoderDecoderCache`, which attentions tell by its class."""

    def __init__(self, cache: Any, rows: Layout | None, context: Layout | None) -> None:
        self._cache = cache
        self.is_updated = cache.is_updated
        self.self_attention_cache = Prefill.of(cache.self_attention_cache, rows, None)
        self.cross_attention_cache = Prefill.of(cache.cross_attention_cache, context, None)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """For isinstance."""
        return type(self._cache)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many keys of the rows themselves it holds."""
        length: int = self._cache.get_seq_length(layer_idx)
        return length


def layer_index(layer: nn.Module) -> int | None:
    """Where a layer's keys are in a cache."""
    for module in layer.modules():
        index = module.__dict__.get("layer_idx")
        if index is not None:
            return int(index)
    return None


def _is(cache: Any, name: str) -> bool:
    of = type(cache)
    return of.__name__ == name and of.__module__ == "transformers.cache_utils"
