"""Attention of joined streams, taken apart: by source, in the coordinates of its padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.nn._modality_stream import ModalityStream
from mmfast.nn.packed_tokens import PackedTokens

Maps = dict[str, dict[str, Tensor]]
BOTTLENECK = "bottleneck"  # the name of the bottleneck tokens among streams and sources


class AttentionMaps:
    """Collects what the layers of a model saw.

    Args:
        importance: collect column sums.
        weights: collect whole maps: True for the head mean, "per_head".
    """

    def __init__(self, importance: bool, weights: bool | str) -> None:
        self.asked: dict[str, Any] = {}
        if importance:
            self.asked["return_importance"] = True
        if weights:
            self.asked["return_weights"] = weights
        self._importance: dict[tuple[str, str], list[Tensor]] = {}
        self._weights: dict[tuple[str, str], list[Tensor]] = {}

    def add(
        self,
        name: str,
        query: ModalityStream,
        sources: Sequence[str],
        parts: Sequence[ModalityStream],
        importance: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """What the stream `name` saw of its sources joined in one layer."""
        if importance is not None:
            self._add_importance(name, query, sources, parts, importance)
        if weights is not None:
            self._add_weights([name], [query], sources, parts, weights)

    def add_self(
        self,
        name: str,
        both: ModalityStream,
        sources: Sequence[str],
        parts: Sequence[ModalityStream],
        importance: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """The same of joined streams that attended to themselves: rows are taken apart as well."""
        if importance is not None:
            self._add_importance(name, both, sources, parts, importance)
        if weights is not None:
            self._add_weights(sources, parts, sources, parts, weights)

    def _add_importance(
        self,
        name: str,
        query: ModalityStream,
        sources: Sequence[str],
        parts: Sequence[ModalityStream],
        importance: Tensor,
    ) -> None:
        counts = query.counts()
        share = importance
        if counts is None:
            share = importance / max(query.length, 1)
        else:
            share = importance / counts.clamp(min=1).view(-1, 1, 1)
        for source, part in zip(sources, _apart(share, parts), strict=True):
            self._importance.setdefault((name, source), []).append(part)

    def _add_weights(
        self,
        names: Sequence[str],
        queries: Sequence[ModalityStream],
        sources: Sequence[str],
        parts: Sequence[ModalityStream],
        weights: Tensor,
    ) -> None:
        by_row = _apart(weights.transpose(-1, -2), queries)
        for name, rows in zip(names, by_row, strict=True):
            for source, part in zip(sources, _apart(rows.transpose(-1, -2), parts), strict=True):
                if not (name == source == BOTTLENECK):  # once a stream: it is nobody's
                    self._weights.setdefault((name, source), []).append(part)

    @staticmethod
    def spread(importance: Tensor, stream: ModalityStream) -> Tensor:
        """`[B, heads, keys]` of one stream in the coordinates of its padded tokens."""
        return _apart(importance, [stream])[0]

    def importance(self) -> Maps:
        """stream -> source -> `[B, layers, heads, N_source]`"""
        return _stacked(self._importance)

    def weights(self) -> Maps:
        """stream -> source -> `[B, layers, (heads,) N_stream, N_source]`"""
        return _stacked(self._weights)


def _stacked(found: dict[tuple[str, str], list[Tensor]]) -> Maps:
    maps: Maps = {}
    for (name, source), layers in found.items():
        maps.setdefault(name, {})[source] = torch.stack(layers, dim=1)
    return maps


def _apart(joined: Tensor, parts: Sequence[ModalityStream]) -> list[Tensor]:
    """`[B, ..., M]` over joined streams -> `[B, ..., N]` over each one's padded tokens."""
    if not any(isinstance(part.tokens, PackedTokens) for part in parts):
        return list(joined.split([part.length for part in parts], dim=-1))
    found, before = [], None
    for part in parts:
        tokens = part.placed()
        row = _row_in_item(tokens)
        index = row if before is None else row + before.unsqueeze(1)
        before = tokens.lens if before is None else before + tokens.lens
        if joined.shape[-1] == 0:
            found.append(joined.new_zeros(*joined.shape[:-1], tokens.length))
            continue
        index = index.clamp(0, joined.shape[-1] - 1)
        shape = (tokens.batch, *(1,) * (joined.dim() - 2), tokens.length)
        there = joined.gather(-1, index.view(shape).expand(*joined.shape[:-1], -1))
        found.append(there.masked_fill((row < 0).view(shape), 0.0))
    return found


def _row_in_item(tokens: PackedTokens) -> Tensor:
    """int64 `[B, length]`: which row of its item a padded token is; -1 at padding."""
    rows = torch.full((tokens.batch * tokens.length,), -1, device=tokens.device)
    own = torch.arange(tokens.total, device=tokens.device) - tokens.cu_seqlens[tokens.items]
    index = tokens.padded_index(tokens.length)
    if index is None:
        return own.view(tokens.batch, tokens.length)
    return rows.index_copy(0, index, own).view(tokens.batch, tokens.length)
