"""BERT and the two-modality models written after it: LXMERT, VisualBERT, ViLT, FLAVA, ...

Their layers run on tokens without padding. Attention that is written out in these files goes
through `attend`; attention that transformers finds by name needs no adapter of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmfast.integrations._attention import PackedMask, attend
from mmfast.integrations._inside import records_attention
from mmfast.integrations._masks import recognised
from mmfast.integrations._packing import (
    PackedLayer,
    layout_of,
    self_mask,
)
from mmfast.integrations.registry import Adapter, Kind, adapter

_A = TypeVar("_A", bound=type[nn.Module])


def row(model: str, prefix: str, name: str, kind: Kind, parts: str = "") -> Callable[[_A], _A]:
    """Register a mixin for `prefix + name` of a model, relying on `prefix + part` of each part."""
    return adapter(
        f"transformers.models.{model}.modeling_{model}.{prefix}{name}",
        kind=kind,
        relies_on=tuple(prefix + part for part in parts.split()),
    )


def heads(x: Tensor, width: int) -> Tensor:
    """`[B, N, H * width]` -> `[B, H, N, width]`"""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


# --- attention that is written out ---------------------------------------------------------------


@row("visual_bert", "VisualBert", "SelfAttention", "attention")
@row("vilt", "Vilt", "SelfAttention", "attention")
@row("flava", "Flava", "SelfAttention", "attention")
class SelfAttention(Adapter):
    """Self-attention of BERT as these files have it: returns `(context, weights if asked for)`."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    dropout: nn.Dropout
    attention_head_size: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | PackedMask | None = None,
        output_attentions: bool = False,
    ) -> Any:
        """`[B, N, C]` -> `([B, N, C], [B, H, N, N])`, the second with `output_attentions` only."""
        return _attention(self, hidden_states, hidden_states, attention_mask, output_attentions)


@row("lxmert", "Lxmert", "Attention", "attention")
class LxmertAttention(SelfAttention):
    """As `SelfAttention`, over another stream."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        context: Tensor,
        attention_mask: Tensor | PackedMask | None = None,
        output_attentions: bool = False,
    ) -> Any:
        """`[B, N, C]` over `[B, M, C']`."""
        return _attention(self, hidden_states, context, attention_mask, output_attentions)


def _attention(
    module: SelfAttention,
    hidden: Tensor,
    context: Tensor,
    mask: Tensor | PackedMask | None,
    need_weights: bool,
) -> Any:
    width = module.attention_head_size
    out, weights = attend(
        module,
        heads(module.query(hidden), width),
        heads(module.key(context), width),
        heads(module.value(context), width),
        mask,
        dropout=module.dropout.p if module.training else 0.0,
        need_weights=need_weights,
    )
    out = out.flatten(-2)
    return (out, weights) if need_weights else (out,)


@row("layoutlmv3", "LayoutLMv3", "SelfAttention", "attention")
class LayoutLMv3SelfAttention(SelfAttention):
    """With biases of the relative positions, scaled as the scores are.

    What the file calls CogView's attention is the same softmax, made safe for half precision.
    """

    has_relative_attention_bias: bool
    has_spatial_attention_bias: bool

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rel_pos: Tensor | None = None,
        rel_2d_pos: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """`[B, N, C]` -> `([B, N, C], [B, H, N, N] where the model collects weights)`."""
        bias = None
        if self.has_relative_attention_bias:
            bias = rel_pos
            if self.has_spatial_attention_bias:
                assert rel_pos is not None and rel_2d_pos is not None
                bias = rel_pos + rel_2d_pos
        width = self.attention_head_size
        out, weights = attend(
            self,
            heads(self.query(hidden_states), width),
            heads(self.key(hidden_states), width),
            heads(self.value(hidden_states), width),
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            position_bias=None if bias is None else bias * width**-0.5,
            need_weights=records_attention(),
        )
        return out.flatten(-2), weights


# --- layers without padding ----------------------------------------------------------------------

_LAYER = "Attention SelfAttention SelfOutput Intermediate Output"


@row("visual_bert", "VisualBert", "Layer", "layer", _LAYER)
@row("vilt", "Vilt", "Layer", "layer", _LAYER)
@row("flava", "Flava", "Layer", "layer", _LAYER)
@row("align", "AlignText", "Layer", "layer", _LAYER)
@row("clap", "ClapText", "Layer", "layer", _LAYER)
@row("layoutlm", "LayoutLM", "Layer", "layer", _LAYER)
@row("lxmert", "Lxmert", "Layer", "layer", "Attention SelfAttentionLayer AttentionOutput "
     "Intermediate Output")  # fmt: skip
class EncoderLayer(PackedLayer):
    """`forward(hidden_states, attention_mask, ...)`, self-attention and feed-forward."""


@row("bert", "Bert", "Layer", "layer", _LAYER + " CrossAttention")
@row("roberta", "Roberta", "Layer", "layer", _LAYER + " CrossAttention")
@row("bridgetower", "BridgeTower", "TextLayer", "layer", _LAYER + " CrossAttention")
@row("bridgetower", "BridgeTower", "BertCrossLayer", "layer", _LAYER + " CrossAttention")
class DecoderLayer(PackedLayer):
    """With cross-attention to `encoder_hidden_states` where these are given."""

    context = "encoder_hidden_states"
    context_mask = "encoder_attention_mask"
    context_alone = True


@row("lxmert", "Lxmert", "XLayer", "layer", "Attention CrossAttentionLayer SelfAttentionLayer "
     "AttentionOutput Intermediate Output")  # fmt: skip
class LxmertXLayer(Adapter):
    """Two streams that attend to each other and then to themselves, each without its padding."""

    visual_attention: Callable[..., Any]
    lang_self_att: Callable[..., Any]
    visn_self_att: Callable[..., Any]
    output_fc: Callable[..., tuple[Tensor, Tensor]]

    def forward(
        self,
        lang_feats: Tensor,
        lang_attention_mask: Tensor | None,
        visual_feats: Tensor,
        visual_attention_mask: Tensor | None,
        output_attentions: bool = False,
    ) -> Any:
        """Language `[B, N, C]` and regions `[B, M, C]`, masks `[B, 1, 1, N]` and `[B, 1, 1, M]`."""
        texts = regions = None
        leave = output_attentions or torch.compiler.is_compiling()
        if not leave and _understood(lang_attention_mask) and _understood(visual_attention_mask):
            texts = layout_of(self, lang_attention_mask, lang_feats)
            regions = layout_of(self, visual_attention_mask, visual_feats)
        if texts is None and regions is None:
            return super().forward(
                lang_feats,
                lang_attention_mask,
                visual_feats,
                visual_attention_mask,
                output_attentions=output_attentions,
            )
        to_texts = PackedMask(regions, texts, kv_mask=None if texts else lang_attention_mask)
        to_regions = PackedMask(texts, regions, kv_mask=None if regions else visual_attention_mask)
        among_texts: Any = lang_attention_mask
        among_regions: Any = visual_attention_mask
        if texts is not None:
            lang_feats, among_texts = texts.pack(lang_feats), self_mask(among_texts, texts)
        if regions is not None:
            visual_feats = regions.pack(visual_feats)
            among_regions = self_mask(among_regions, regions)
        (lang,) = self.visual_attention(lang_feats, visual_feats, ctx_att_mask=to_regions)
        (visual,) = self.visual_attention(visual_feats, lang_feats, ctx_att_mask=to_texts)
        (lang,) = self.lang_self_att(lang, among_texts)
        (visual,) = self.visn_self_att(visual, among_regions)
        lang, visual = self.output_fc(lang, visual)
        return (
            lang if texts is None else texts.unpack(lang),
            visual if regions is None else regions.unpack(visual),
        )


def _understood(mask: Tensor | None) -> bool:
    """Whether a mask is key padding that leaves every item something to see."""
    pattern = None if mask is None else recognised(mask)
    return mask is None or (pattern is not None and pattern.dead is None)
