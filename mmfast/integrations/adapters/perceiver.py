"""Perceiver: attention that is written out, over inputs without their padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfast.integrations._attention import PackedMask, attend
from mmfast.integrations._layout import Layout
from mmfast.integrations._masks import recognised
from mmfast.integrations._packing import layout_of
from mmfast.integrations.adapters.encoder_decoder import row
from mmfast.integrations.registry import Adapter


@row("perceiver", "Perceiver", "SelfAttention", "", kind="attention")
class Attention(Adapter):
    """Latents among themselves, latents over inputs, and positions over latents.

    Inputs `[B, M, C]` that their mask calls padding are neither normalised nor projected.
    """

    layernorm1: nn.Module
    layernorm2: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    dropout: nn.Dropout
    num_heads: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inputs: Tensor | None = None,
        inputs_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Any, ...]:
        """As the stock class."""
        hidden_states = self.layernorm1(hidden_states)
        mask: Tensor | PackedMask | None = attention_mask
        if inputs is not None:
            mask = inputs_mask
            layout = self._layout(inputs, inputs_mask)
            if layout is not None and not output_attentions:
                inputs, mask = layout.pack(inputs), PackedMask(None, layout)
            rows = self.layernorm2(inputs)
        else:
            rows = hidden_states
        out, weights = attend(
            self,
            self._heads(self.query(hidden_states)),
            self._heads(self.key(rows)),
            self._heads(self.value(rows)),
            mask,
            dropout=self.dropout.p if self.training else 0.0,
            need_weights=bool(output_attentions),
        )
        return (out.flatten(2), weights) if output_attentions else (out.flatten(2),)

    def _layout(self, inputs: Tensor, mask: Tensor | None) -> Layout | None:
        if torch.compiler.is_compiling():
            return None
        # Two projections, keys and values, are what an input costs.
        layout = layout_of(self, mask, inputs, work=2 * inputs.shape[2] ** 2)
        pattern = None if layout is None or mask is None else recognised(mask)
        return layout if pattern is not None and not pattern.causal else None

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
