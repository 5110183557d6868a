"""BLIP's text and image attention, and the Q-Former of its successors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.integrations._attention import PackedMask, attend
from mmfast.integrations._inside import records_attention
from mmfast.integrations._layout import Layout
from mmfast.integrations._masks import recognised
from mmfast.integrations._packing import (
    Arguments,
    PackedLayer,
    layout_of,
    self_mask,
)
from mmfast.integrations.adapters.bert_like import SelfAttention, heads
from mmfast.integrations.registry import Adapter, adapter
from mmfast.nn._tokens import put_rows, take_rows

_BLIP = "transformers.models.blip.modeling_blip"
_BLIP_TEXT = "transformers.models.blip.modeling_blip_text"
_KEEPS_PADDING = "_mmfast_keeps_padding"


@adapter(f"{_BLIP}.BlipAttention", kind="attention")
class BlipAttention(Adapter):
    """Self-attention of the image tower. Weights that are collected come from the stock class."""

    qkv: nn.Linear
    projection: nn.Linear
    dropout: nn.Dropout
    scale: float
    num_heads: int

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """`[B, N, C]` -> `([B, N, C], None)`"""
        if kwargs.get("output_attentions") or records_attention():
            return super().forward(hidden_states, **kwargs)
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        dropout = self.dropout.p if self.training else 0.0
        out, _ = attend(self, q, k, v, None, scaling=self.scale, dropout=dropout)
        return self.projection(out.flatten(-2)), None


@adapter(f"{_BLIP_TEXT}.BlipTextSelfAttention", kind="attention")
class BlipTextAttention(SelfAttention):
    """Self- or cross-attention of the text, with a cache."""

    layer_idx: int | None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """`[B, N, C]` -> `([B, N, C], weights [B, H, N, M] where the model collects them)`"""
        across = encoder_hidden_states is not None
        mask = attention_mask
        if across and not isinstance(attention_mask, PackedMask):
            mask = encoder_attention_mask
        key, value = self._keys(hidden_states, encoder_hidden_states, past_key_values)
        out, weights = attend(
            self,
            heads(self.query(hidden_states), self.attention_head_size),
            key,
            value,
            mask,
            dropout=self.dropout.p if self.training else 0.0,
            need_weights=not isinstance(mask, PackedMask) and records_attention(),
        )
        return out.flatten(-2), weights

    def _keys(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """Of these tokens and those in the cache, or of what is attended to, computed once."""
        across = encoder_hidden_states is not None
        both = hasattr(cache, "cross_attention_cache")
        if across and both and cache.is_updated.get(self.layer_idx):
            kept = cache.cross_attention_cache.layers[self.layer_idx]
            return kept.keys, kept.values
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key = heads(self.key(states), self.attention_head_size)
        value = heads(self.value(states), self.attention_head_size)
        if cache is None:
            return key, value
        of = cache
        if both:
            of = cache.cross_attention_cache if across else cache.self_attention_cache
        key, value = of.update(key, value, self.layer_idx)
        if across and both:
            cache.is_updated[self.layer_idx] = True
        return key, value


@adapter(
    f"{_BLIP_TEXT}.BlipTextLayer",
    kind="layer",
    relies_on=("BlipTextAttention", "BlipTextSelfAttention", "BlipTextSelfOutput",
               "BlipTextIntermediate", "BlipTextOutput"),
)  # fmt: skip
class BlipTextLayer(PackedLayer):
    """A layer of the text; what it attends to in the image or the question is not packed.

    `BlipTextAttention` of transformers 5.23 does not pass the mask of the cross-attention on, so
    that padding of the question is attended to: it counts, and stays.
    """

    context = "encoder_hidden_states"
    context_mask = "encoder_attention_mask"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class, without padding of the text."""
        given = Arguments(self, args, kwargs)
        given.put("encoder_attention_mask", None)
        return super().forward(*given.args, **given.kwargs)

    def _layout(self, given: Arguments) -> Layout | None:
        return None if _KEEPS_PADDING in self.__dict__ else super()._layout(given)


@adapter(f"{_BLIP}.BlipForQuestionAnswering", kind="module")
class BlipForQuestionAnswering(Adapter):
    """The answer attends to all rows of the encoded question, padding too: these are computed."""

    text_encoder: nn.Module

    def _mmfast_install(self) -> None:
        for layer in self.text_encoder.encoder.layer:  # type: ignore[union-attr]
            layer.__dict__[_KEEPS_PADDING] = True

    def _mmfast_remove(self) -> None:
        for layer in self.text_encoder.encoder.layer:  # type: ignore[union-attr]
            layer.__dict__.pop(_KEEPS_PADDING, None)


@adapter(
    "transformers.models.opt.modeling_opt.OPTDecoderLayer",
    kind="layer",
    relies_on=("OPTAttention",),
)
class OPTLayer(PackedLayer):
    """A layer of the language model of BLIP-2."""


@adapter(
    "transformers.models.blip_2.modeling_blip_2.Blip2QFormerLayer",
    kind="layer",
    relies_on=("Blip2QFormerAttention", "Blip2QFormerMultiHeadAttention", "Blip2QFormerSelfOutput",
               "Blip2QFormerIntermediate", "Blip2QFormerOutput"),
)  # fmt: skip
@adapter(
    "transformers.models.instructblip.modeling_instructblip.InstructBlipQFormerLayer",
    kind="layer",
    relies_on=("InstructBlipQFormerAttention", "InstructBlipQFormerMultiHeadAttention",
               "InstructBlipQFormerSelfOutput", "InstructBlipQFormerIntermediate",
               "InstructBlipQFormerOutput"),
)  # fmt: skip
class QFormerLayer(Adapter):
    """Queries, which look at the image, before a padded text, which does not."""

    attention: Callable[..., Tensor]
    crossattention: Callable[..., Tensor]
    has_cross_attention: bool
    chunk_size_feed_forward: int
    feed_forward_chunk: Callable[[Tensor], Tensor]
    feed_forward_chunk_query: Callable[[Tensor], Tensor]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        query_length: int = 0,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, query_length + N, C]`; padding of the text comes out 0."""
        layout = None
        if not (
            torch.compiler.is_compiling() or self.chunk_size_feed_forward or records_attention()
        ):
            layout = layout_of(self, attention_mask, hidden_states)
        if (
            layout is None
            or not 0 < query_length < hidden_states.shape[1]
            or not _all_valid(attention_mask, query_length)
        ):
            result: Tensor = super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                query_length=query_length,
                **kwargs,
            )
            return result
        mask = self_mask(attention_mask, layout)
        rows = self.attention(
            hidden_states=layout.pack(hidden_states), attention_mask=mask, **kwargs
        ).squeeze(0)
        of_query = layout.index % layout.length < query_length
        places = of_query.nonzero().squeeze(1), (~of_query).nonzero().squeeze(1)
        queries = take_rows(rows, places[0]).unflatten(0, (layout.batch, query_length))
        if self.has_cross_attention:
            if encoder_hidden_states is None:
                raise ValueError("encoder_hidden_states must be given for cross-attention layers")
            queries = self.crossattention(
                hidden_states=queries,
                attention_mask=None,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                **kwargs,
            )
        queries = self.feed_forward_chunk_query(queries).flatten(0, 1)
        texts = self.feed_forward_chunk(take_rows(rows, places[1]).unsqueeze(0)).squeeze(0)
        rows = put_rows(torch.cat((queries, texts)), torch.cat(places), layout.total)
        return layout.unpack(rows.unsqueeze(0))


def _all_valid(mask: Tensor | None, length: int) -> bool:
    """Whether the first rows are tokens in every item."""
    pattern = None if mask is None else recognised(mask)
    return pattern is not None and bool(pattern.valid[:, :length].all())
