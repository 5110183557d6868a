"""Encoder-decoders and speech encoders whose layers are token-wise but for attention by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from mmfast.integrations._packing import PackedLayer
from mmfast.integrations.registry import Kind, adapter

_A = TypeVar("_A", bound=type[nn.Module])


def row(model: str, prefix: str, name: str, parts: str, kind: Kind = "layer") -> Callable[[_A], _A]:
    """Register a mixin for `prefix + name` of a model, relying on `prefix + part` of each part."""
    return adapter(
        f"transformers.models.{model}.modeling_{model}.{prefix}{name}",
        kind=kind,
        relies_on=tuple(prefix + part for part in parts.split()),
    )


@row("bart", "Bart", "EncoderLayer", "Attention")
@row("mbart", "MBart", "EncoderLayer", "Attention")
@row("marian", "Marian", "EncoderLayer", "Attention")
@row("pegasus", "Pegasus", "EncoderLayer", "Attention")
@row("plbart", "PLBart", "EncoderLayer", "Attention")
@row("blenderbot", "Blenderbot", "EncoderLayer", "Attention")
@row("blenderbot_small", "BlenderbotSmall", "EncoderLayer", "Attention")
@row("m2m_100", "M2M100", "EncoderLayer", "Attention")
@row("seamless_m4t", "SeamlessM4T", "EncoderLayer", "Attention FeedForwardNetwork")
class EncoderLayer(PackedLayer):
    """`forward(hidden_states, attention_mask, ...)`. (Whisper's encoder is given no mask.)"""


@row("bart", "Bart", "DecoderLayer", "Attention")
@row("mbart", "MBart", "DecoderLayer", "Attention")
@row("marian", "Marian", "DecoderLayer", "Attention")
@row("pegasus", "Pegasus", "DecoderLayer", "Attention")
@row("plbart", "PLBart", "DecoderLayer", "Attention")
@row("blenderbot", "Blenderbot", "DecoderLayer", "Attention")
@row("blenderbot_small", "BlenderbotSmall", "DecoderLayer", "Attention")
@row("m2m_100", "M2M100", "DecoderLayer", "Attention")
@row("musicgen", "Musicgen", "DecoderLayer", "Attention")
@row("seamless_m4t", "SeamlessM4T", "DecoderLayer", "Attention FeedForwardNetwork")
class DecoderLayer(PackedLayer):
    """`forward(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, ...)`.

    Packed where the cache, if there is one, holds nothing yet: in training, and where a given
    target is scored.
    """

    context = "encoder_hidden_states"
    context_mask = "encoder_attention_mask"
    context_alone = True


@row("whisper", "Whisper", "DecoderLayer", "Attention")
class WhisperDecoderLayer(DecoderLayer):
    """Its attention views the keys with the batch size of the queries."""

    context_packed = True
    context_alone = False


@row("moonshine", "Moonshine", "EncoderLayer", "Attention EncoderMLP")
@row("dia", "Dia", "EncoderLayer", "SelfAttention MLP RMSNorm")
class RotaryEncoderLayer(EncoderLayer):
    """With rotary positions, `(cos, sin)` of `[1 or B, N, D]`."""

    rows = ("position_embeddings",)


@row("dia", "Dia", "DecoderLayer", "SelfAttention CrossAttention MLP RMSNorm")
class RotaryDecoderLayer(DecoderLayer):
    """With rotary positions, `(cos, sin)` of `[1 or B, N, D]`."""

    rows = ("position_embeddings",)


@row("moonshine", "Moonshine", "DecoderLayer", "Attention DecoderMLP")
class MoonshineDecoderLayer(RotaryDecoderLayer):
    """Its attention views the keys with the batch size of the queries."""

    context_packed = True
    context_alone = False


@row("pix2struct", "Pix2Struct", "VisionLayer", "VisionAttention VisionMlp LayerNorm")
class VisionLayer(PackedLayer):
    """Patches of an image, padded to the largest number of them."""


_SPEECH = "Attention FeedForward AttnAdapterLayer"


@row("wav2vec2", "Wav2Vec2", "EncoderLayer", _SPEECH)
@row("wav2vec2", "Wav2Vec2", "EncoderLayerStableLayerNorm", _SPEECH)
@row("hubert", "Hubert", "EncoderLayer", _SPEECH)
@row("hubert", "Hubert", "EncoderLayerStableLayerNorm", _SPEECH)
class SpeechEncoderLayer(PackedLayer):
    """Frames of speech."""

    attention: Any

    def _mmfast_why_not(self) -> str | None:
        if getattr(self.attention.config, "add_adapter", False):
            return "convolutions behind it (add_adapter) reach into the padding"
        return None
