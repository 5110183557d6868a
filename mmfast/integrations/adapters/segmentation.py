"""Mask2Former and OneFormer: queries that attend to where the last layer saw their masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.integrations._attention import attend
from mmfast.integrations.adapters.bert_like import heads, row
from mmfast.integrations.adapters.detr import plus
from mmfast.integrations.registry import Adapter


@row("mask2former", "Mask2Former", "Attention", "attention")
@row("oneformer", "OneFormer", "Attention", "attention")
class SequenceFirstAttention(Adapter):
    """Positions are added to queries and keys; the sequence is the first dimension."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    dropout: float
    num_heads: int
    head_dim: int
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        key_value_states: Tensor | None = None,
        key_value_position_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`[N, B, C]` -> `([N, B, C], [B, H, N, M] or None)`; the mask `[B * H, N, M]` is added."""
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            return super().forward(
                hidden_states, attention_mask, position_embeddings, key_value_states,
                key_value_position_embeddings, output_attentions,
            )  # fmt: skip
        queries = plus(hidden_states, position_embeddings)
        values, keys = hidden_states, queries
        if key_value_states is not None:
            values = key_value_states
            keys = plus(values, key_value_position_embeddings)
        mask = attention_mask
        if mask is not None:
            mask = mask.unflatten(0, (-1, self.num_heads))
        out, weights = attend(
            self,
            self._heads(self.q_proj(queries)),
            self._heads(self.k_proj(keys)),
            self._heads(self.v_proj(values)),
            mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            need_weights=output_attentions,
        )
        return self.out_proj(out.flatten(-2).transpose(0, 1)), weights

    def _heads(self, x: Tensor) -> Tensor:
        return heads(x.transpose(0, 1), self.head_dim)
