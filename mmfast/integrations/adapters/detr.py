"""DETR and the detectors built like it: an encoder of pictures, and queries that attend to it.

A padded picture's padding is at the end of each of its lines. The encoder's layers run on what is
not padding, and so do the keys and values of the decoder's, whose own rows have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.integrations._attention import PackedMask, attend
from mmfast.integrations._packing import PackedLayer, layout_of
from mmfast.integrations.adapters.bert_like import heads, row
from mmfast.integrations.registry import Adapter

# --- layers without padding ----------------------------------------------------------------------


@row("detr", "Detr", "EncoderLayer", "layer", "SelfAttention MLP")
@row("conditional_detr", "ConditionalDetr", "EncoderLayer", "layer", "SelfAttention MLP")
class EncoderLayer(PackedLayer):
    """The position embeddings are those of the pixels."""

    rows = ("spatial_position_embeddings",)


@row("table_transformer", "TableTransformer", "EncoderLayer", "layer", "Attention")
class TableTransformerEncoderLayer(PackedLayer):
    """As `EncoderLayer`, under another name."""

    rows = ("object_queries",)


@row("detr", "Detr", "DecoderLayer", "layer", "SelfAttention CrossAttention MLP")
@row("maskformer", "MaskFormerDetr", "DecoderLayer", "layer", "SelfAttention CrossAttention MLP")
@row(
    "conditional_detr",
    "ConditionalDetr",
    "DecoderLayer",
    "layer",
    "DecoderSelfAttention DecoderCrossAttention MLP",
)
class DecoderLayer(PackedLayer):
    """Its rows are the queries for objects, without padding; its context is the picture."""

    context = "encoder_hidden_states"
    context_mask = "encoder_attention_mask"
    context_rows = ("spatial_position_embeddings",)
    context_alone = True


@row("table_transformer", "TableTransformer", "DecoderLayer", "layer", "Attention")
class TableTransformerDecoderLayer(DecoderLayer):
    """As `DecoderLayer`; the embeddings of the pixels are called those of the objects."""

    context_rows = ("object_queries",)


# --- Table Transformer ---------------------------------------------------------------------------


@row("table_transformer", "TableTransformer", "Attention", "attention")
class TableTransformerAttention(Adapter):
    """Self-attention, or over `key_value_states`; positions are added to queries and keys."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    dropout: float
    head_dim: int
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | PackedMask | None = None,
        object_queries: Tensor | None = None,
        key_value_states: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, N, C]` -> `([B, N, C], [B, H, N, M] or None)`; a bool mask has True = masked."""
        queries = plus(hidden_states, object_queries)
        values, keys = hidden_states, queries
        if key_value_states is not None:
            values = key_value_states
            keys = plus(values, spatial_position_embeddings)
        if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool:
            attention_mask = ~attention_mask
        out, weights = attend(
            self,
            heads(self.q_proj(queries), self.head_dim),
            heads(self.k_proj(keys), self.head_dim),
            heads(self.v_proj(values), self.head_dim),
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            need_weights=output_attentions,
        )
        return self.out_proj(out.flatten(-2)), weights


def plus(rows: Tensor, position: Tensor | None) -> Tensor:
    """Rows with their positions, where there are any."""
    return rows if position is None else rows + position


# --- DAB-DETR ------------------------------------------------------------------------------------


@row("dab_detr", "", "DetrAttention", "attention")
class DabDetrEncoderAttention(Adapter):
    """Self-attention of the encoder."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    attention_dropout: float
    head_dim: int
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | PackedMask | None = None,
        object_queries: Tensor | None = None,
        key_value_states: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, N, C]` -> `([B, N, C], [B, H, N, N] or None)`; `key_value_states` is not read."""
        positioned = plus(hidden_states, object_queries)
        out, weights = attend(
            self,
            heads(self.q_proj(positioned), self.head_dim),
            heads(self.k_proj(positioned), self.head_dim),
            heads(self.v_proj(hidden_states), self.head_dim),
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            need_weights=output_attentions,
        )
        return self.out_proj(out.flatten(-2)), weights


@row("dab_detr", "DabDetr", "EncoderLayer", "layer")
class DabDetrEncoderLayer(PackedLayer):
    """As `EncoderLayer`, under another name."""

    rows = ("object_queries",)


@row("dab_detr", "DabDetr", "Attention", "attention")
class DabDetrAttention(Adapter):
    """Attention of the decoder, whose projections are in the layers round it."""

    output_proj: nn.Linear
    attention_dropout: float
    attention_head_dim: int
    values_head_dim: int
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | PackedMask | None = None,
        key_states: Tensor | None = None,
        value_states: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, N, 2 C]` over keys `[B, M, 2 C]`, values `[B, M, C]` -> `([B, N, C], weights)`."""
        assert key_states is not None and value_states is not None
        out, weights = attend(
            self,
            heads(hidden_states, self.attention_head_dim),
            heads(key_states, self.attention_head_dim),
            heads(value_states, self.values_head_dim),
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            need_weights=bool(output_attentions),
        )
        return self.output_proj(out.flatten(-2)), weights


@row("dab_detr", "DabDetr", "DecoderLayerSelfAttention", "attention", "Attention")
class DabDetrSelfAttention(Adapter):
    """The stock class asks for the weights whether or not anybody wants them."""

    self_attn_query_content_proj: nn.Linear
    self_attn_query_pos_proj: nn.Linear
    self_attn_key_content_proj: nn.Linear
    self_attn_key_pos_proj: nn.Linear
    self_attn_value_proj: nn.Linear
    self_attn: nn.Module
    self_attn_layer_norm: nn.LayerNorm
    dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        query_position_embeddings: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, N, C]` -> `([B, N, C], [B, H, N, N] with output_attentions)`."""
        position = query_position_embeddings
        attended, weights = self.self_attn(
            hidden_states=self.self_attn_query_content_proj(hidden_states)
            + self.self_attn_query_pos_proj(position),
            attention_mask=attention_mask,
            key_states=self.self_attn_key_content_proj(hidden_states)
            + self.self_attn_key_pos_proj(position),
            value_states=self.self_attn_value_proj(hidden_states),
            output_attentions=output_attentions,
        )
        attended = F.dropout(attended, p=self.dropout, training=self.training)
        return self.self_attn_layer_norm(hidden_states + attended), weights


@row("dab_detr", "DabDetr", "DecoderLayerCrossAttention", "attention", "Attention")
class DabDetrCrossAttention(Adapter):
    """Queries with positions beside them over the picture, its padding left out."""

    cross_attn_query_content_proj: nn.Linear
    cross_attn_query_pos_proj: nn.Linear | None
    cross_attn_query_pos_sine_proj: nn.Linear
    cross_attn_key_content_proj: nn.Linear
    cross_attn_key_pos_proj: nn.Linear
    cross_attn_value_proj: nn.Linear
    cross_attn: nn.Module
    cross_attn_layer_norm: nn.LayerNorm
    decoder_attention_heads: int
    keep_query_pos: bool
    is_first: bool
    dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        query_position_embeddings: Tensor | None = None,
        object_queries: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        query_sine_embed: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, N, C]` over `[B, M, C]` -> `([B, N, C], [B, H, N, M] with output_attentions)`."""
        assert encoder_hidden_states is not None and object_queries is not None
        context, position = encoder_hidden_states, object_queries
        mask: Any = encoder_attention_mask
        layout = None
        if not output_attentions and isinstance(self.cross_attn, Adapter):
            layout = layout_of(self, mask, context, work=3 * context.shape[-1] ** 2)
        if layout is not None:
            context, position = layout.pack(context), layout.pack(position)
            mask = PackedMask(None, layout)

        query = self.cross_attn_query_content_proj(hidden_states)
        key = self.cross_attn_key_content_proj(context)
        key_position = self.cross_attn_key_pos_proj(position)
        if self.is_first or self.keep_query_pos:
            assert self.cross_attn_query_pos_proj is not None
            query = query + self.cross_attn_query_pos_proj(query_position_embeddings)
            key = key + key_position
        attended, weights = self.cross_attn(
            hidden_states=self._beside(
                query, self.cross_attn_query_pos_sine_proj(query_sine_embed)
            ),
            attention_mask=mask,
            key_states=self._beside(key, key_position),
            value_states=self.cross_attn_value_proj(context),
            output_attentions=output_attentions,
        )
        attended = F.dropout(attended, p=self.dropout, training=self.training)
        return self.cross_attn_layer_norm(hidden_states + attended), weights

    def _beside(self, content: Tensor, position: Tensor) -> Tensor:
        """Two `[B, N, C]` -> `[B, N, 2 C]`, head by head."""
        shape = (self.decoder_attention_heads, -1)
        parts = content.unflatten(-1, shape), position.unflatten(-1, shape)
        return torch.cat(parts, -1).flatten(-2)
