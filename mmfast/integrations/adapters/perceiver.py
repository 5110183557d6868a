"""Perceiver: attention that is written out, over inputs without their padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfast.integrations import _packing
from mmfast.integrations._attention import PackedMask, attend
from mmfast.integrations._layout import Layout
from mmfast.integrations._masks import recognised
from mmfast.integrations.adapters.encoder_decoder import row
from mmfast.integrations.registry import Adapter
from mmfast.ops._autograd import in_eager


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
            layout = None if output_attentions else _inputs_layout(self, inputs, inputs_mask)
            if layout is not None:
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

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _inputs_layout(module: nn.Module, inputs: Tensor, mask: Tensor | None) -> Layout | None:
    """Where inputs `[B, M, C]` are no padding; None: leave it in."""
    if torch.compiler.is_compiling() or type(inputs) is not Tensor or not in_eager():
        return None
    pattern = recognised(mask) if isinstance(mask, Tensor) else None
    if pattern is None or pattern.causal or pattern.dead is not None or pattern.full:
        return None
    if tuple(pattern.valid.shape) != tuple(inputs.shape[:2]):
        return None
    layout = pattern.layout()
    width = inputs.shape[2]
    left_out = inputs.shape[0] * inputs.shape[1] - layout.total
    enough = left_out * 2 * width * width >= _packing.LEAST_WORK
    return layout if enough and layout.valid_share <= _packing.LARGEST_SHARE else None
