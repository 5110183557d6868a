"""Layers of decoder-only models, and of the vision encoders of some: padding is not computed.

A row for each class: the folder of transformers, the layer, and the classes inside that see packed
rows. Layers with a window or chunks are packed where their mask comes to no more than causality,
that is for texts within one window.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmfast.integrations._attention import PackedMask
from mmfast.integrations._layout import Layout
from mmfast.integrations._packing import Arguments, PackedLayer
from mmfast.integrations.registry import adapter


class DecoderLayer(PackedLayer):
    """Causal self-attention with rotary positions, and an MLP or experts."""

    rows = ("position_embeddings", "position_ids")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class, without padding; a step of one token has none to look for."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.shape[-2] == 1:
            return super(PackedLayer, self).forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


_DECODERS = {
    "aria": ("AriaTextDecoderLayer", "AriaTextAttention", "AriaTextMoELayer", "AriaTextTopKRouter",
             "AriaExperts", "AriaSharedExpertsMLP", "AriaTextRMSNorm"),
    "chameleon": ("ChameleonDecoderLayer", "ChameleonAttention", "ChameleonMLP",
                  "ChameleonLayerNorm", "ChameleonRMSNorm"),
    "gemma": ("GemmaDecoderLayer", "GemmaAttention", "GemmaMLP", "GemmaRMSNorm"),
    "gemma3": ("Gemma3DecoderLayer", "Gemma3Attention", "Gemma3MLP", "Gemma3RMSNorm"),
    "idefics": ("IdeficsDecoderLayer", "IdeficsAttention", "IdeficsMLP", "IdeficsRMSNorm",
                "IdeficsRotaryEmbedding"),
    "llama": ("LlamaDecoderLayer", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm"),
    "mistral": ("MistralDecoderLayer", "MistralAttention", "MistralMLP", "MistralRMSNorm"),
    "mllama": ("MllamaSelfAttentionDecoderLayer", "MllamaTextSelfAttention", "MllamaTextMLP",
               "MllamaTextRMSNorm"),
    "phi3": ("Phi3DecoderLayer", "Phi3Attention", "Phi3MLP", "Phi3RMSNorm"),
    "qwen2": ("Qwen2DecoderLayer", "Qwen2Attention", "Qwen2MLP", "Qwen2RMSNorm"),
    "qwen2_5_omni": ("Qwen2_5OmniDecoderLayer", "Qwen2_5OmniAttention", "Qwen2MLP",
                     "Qwen2_5OmniRMSNorm"),
    "qwen2_5_vl": ("Qwen2_5_VLDecoderLayer", "Qwen2_5_VLAttention", "Qwen2MLP",
                   "Qwen2_5_VLRMSNorm"),
    "qwen2_vl": ("Qwen2VLDecoderLayer", "Qwen2VLAttention", "Qwen2MLP", "Qwen2VLRMSNorm"),
    "qwen3": ("Qwen3DecoderLayer", "Qwen3Attention", "Qwen3MLP", "Qwen3RMSNorm"),
    "qwen3_vl": ("Qwen3VLTextDecoderLayer", "Qwen3VLTextAttention", "Qwen3VLTextMLP",
                 "Qwen3VLTextRMSNorm"),
    # Its layers of linear attention are given a mask [B, N], which is not recognised.
    "qwen3_next": ("Qwen3NextDecoderLayer", "Qwen3NextAttention", "Qwen3NextMLP",
                   "Qwen3NextSparseMoeBlock", "Qwen3NextTopKRouter", "Qwen3NextExperts",
                   "Qwen3NextRMSNorm"),
}  # fmt: skip


def address(folder: str, name: str) -> str:
    """Where transformers has a class of a model."""
    return f"transformers.models.{folder}.modeling_{folder}.{name}"


for _folder, (_layer, *_inside) in _DECODERS.items():
    adapter(address(_folder, _layer), kind="layer", relies_on=tuple(_inside))(DecoderLayer)


@adapter(
    address("idefics2", "Idefics2EncoderLayer"),
    kind="layer",
    relies_on=("Idefics2VisionAttention", "Idefics2VisionMLP"),
)
class Idefics2EncoderLayer(PackedLayer):
    """Patches of images of several sizes; the resampler reads no padding.

    Not so in idefics3, whose pixel shuffle reads what its layers make of the padding.
    """


@adapter(
    address("evolla", "EvollaSaProtLayer"),
    kind="layer",
    relies_on=(
        "EvollaSaProtAttention", "EvollaSaProtSelfAttention", "EvollaSaProtSelfOutput",
        "EvollaSaProtIntermediate", "EvollaSaProtOutput",
    ),
)  # fmt: skip
class EvollaSaProtLayer(PackedLayer):
    """A layer of the protein encoder; as a decoder with cross-attention it is left as it is."""

    rows = ("position_embeddings",)

    def _layout(self, given: Arguments) -> Layout | None:
        return None if given.get("encoder_hidden_states") is not None else super()._layout(given)


@adapter(
    address("chameleon", "ChameleonSwinDecoderLayer"),
    kind="layer",
    relies_on=_DECODERS["chameleon"][1:],
)
class SwinDecoderLayer(DecoderLayer):
    """Chameleon's layer with its norms behind the sublayers."""


@adapter(
    address("llama4", "Llama4TextDecoderLayer"),
    kind="layer",
    relies_on=(
        "Llama4TextAttention", "Llama4TextMLP", "Llama4TextMoe", "Llama4Router",
        "Llama4TextExperts", "Llama4TextRMSNorm", "Llama4TextL2Norm",
    ),
)  # fmt: skip
class Llama4DecoderLayer(DecoderLayer):
    """Llama 4's. Queries without rotation grow with the row's place in the batch: these keep it."""

    self_attn: Any

    def _layout(self, given: Arguments) -> Layout | None:
        attention = self.self_attn
        if attention.attn_temperature_tuning and not attention.use_rope:
            return None
        return super()._layout(given)


@adapter(
    address("evolla", "EvollaDecoderLayer"),
    kind="layer",
    relies_on=("EvollaAttention", "EvollaMLP", "EvollaRMSNorm"),
)
class EvollaDecoderLayer(DecoderLayer):
    """Evolla's, some with an aligner to proteins, which is told which rows it gets."""

    def _packing(self, given: Arguments) -> tuple[Layout, PackedMask] | None:
        packing = super()._packing(given)
        aligner = getattr(self, "adapter", None)
        if packing is None or aligner is None:
            return packing
        if not getattr(aligner, "_mmfast_takes_packed_rows", False):
            return None
        given.put("query_attn_mask", PackedMask(packing[0], None))
        return packing
