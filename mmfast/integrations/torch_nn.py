"""Adapters of torch.nn's attention and transformer classes: those of `mmfast.nn`, in place."""

from __future__ import annotations

from typing import Any

import mmfast.nn as ours
from mmfast.integrations.registry import Adapter, adapter
from mmfast.nn._plain import unwrapped

_ATTENTION = "torch.nn.modules.activation"
_TRANSFORMER = "torch.nn.modules.transformer"


@adapter(f"{_ATTENTION}.MultiheadAttention", kind="attention", fingerprinted=False)
class MultiheadAttention(ours.MultiheadAttention, Adapter):
    """`mmfast.nn.MultiheadAttention`, which says what differs from torch."""

    def _mmfast_install(self) -> None:
        self._stand_before_fast_path()

    def _mmfast_remove(self) -> None:
        self._stand_aside()
        for state in ("_planned_call", "_drop_weights"):  # of explain(), of its callers
            self.__dict__.pop(state, None)


@adapter(f"{_TRANSFORMER}.TransformerEncoderLayer", kind="layer", fingerprinted=False)
class TransformerEncoderLayer(ours.TransformerEncoderLayer, Adapter):
    """`mmfast.nn.TransformerEncoderLayer`: no padding is computed."""

    def _mmfast_why_not(self) -> str | None:
        return _other_attention(self.self_attn)


@adapter(f"{_TRANSFORMER}.TransformerDecoderLayer", kind="layer", fingerprinted=False)
class TransformerDecoderLayer(ours.TransformerDecoderLayer, Adapter):
    """`mmfast.nn.TransformerDecoderLayer`: no padding is computed."""

    def _mmfast_why_not(self) -> str | None:
        return _other_attention(self.self_attn) or _other_attention(self.multihead_attn)


@adapter(f"{_TRANSFORMER}.TransformerEncoder", kind="module", fingerprinted=False)
class TransformerEncoder(ours.TransformerEncoder, Adapter):
    """`mmfast.nn.TransformerEncoder`: packs once for all its layers."""

    def _mmfast_why_not(self) -> str | None:
        return _other_layers(self.layers, ours.TransformerEncoderLayer)


@adapter(f"{_TRANSFORMER}.TransformerDecoder", kind="module", fingerprinted=False)
class TransformerDecoder(ours.TransformerDecoder, Adapter):
    """`mmfast.nn.TransformerDecoder`: packs once for all its layers."""

    def _mmfast_why_not(self) -> str | None:
        return _other_layers(self.layers, ours.TransformerDecoderLayer)


def _other_attention(attention: Any) -> str | None:
    """Parts are exchanged before what they are in."""
    if isinstance(unwrapped(attention), ours.MultiheadAttention):
        return None
    return f"its attention is a {type(attention).__name__} of torch or the user's own, and was left"


def _other_layers(layers: Any, cls: type[Any]) -> str | None:
    if all(isinstance(layer, cls) for layer in layers):
        return None
    return "not all of its layers were exchanged"
