"""Segment Anything: attention of a picture to itself, with biases for the distance along each axis.

The bias of pixel n for pixel (y, x) is `a_n[y] + b_n[x]`: a scalar product with the unit vectors of
y and x. So the axes become more dimensions of queries and keys, and the bias, which for 64 x 64
pixels and twelve heads is 800 MB a picture, is never there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.integrations._attention import attend
from mmfast.integrations._inside import records_attention
from mmfast.integrations.adapters.bert_like import row
from mmfast.integrations.registry import Adapter


@row("sam", "Sam", "VisionSdpaAttention", "attention", "VisionAttention")
@row("sam_hq", "SamHQ", "VisionSdpaAttention", "attention", "VisionAttention")
class SamVisionAttention(Adapter):
    """Gives no weights, as the stock class that uses SDPA."""

    qkv: nn.Linear
    proj: nn.Linear
    num_attention_heads: int
    scale: float
    use_rel_pos: bool
    rel_pos_h: nn.Parameter
    rel_pos_w: nn.Parameter
    get_rel_pos: Callable[[int, int, Tensor], Tensor]

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None) -> Any:
        """`[B, h, w, C]` -> `([B, h, w, C], None)`"""
        return self._attended(hidden_states, 0.0), None

    def _attended(self, hidden: Tensor, dropout: float) -> Tensor:
        batch, height, width, _ = hidden.shape
        qkv = self.qkv(hidden).view(batch, height * width, 3, self.num_attention_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scaling = self.scale
        if self.use_rel_pos:
            query, key = self._with_axes(query, key, height, width)
            scaling = 1.0
        out, _ = attend(self, query, key, value, None, scaling=scaling, dropout=dropout)
        return self.proj(out.view(batch, height, width, -1))

    def _with_axes(
        self, query: Tensor, key: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """`[B, H, h * w, D]` -> `[B, H, h * w, D + h + w]`, for scores that are not scaled."""
        pixels = query.unflatten(2, (height, width))
        of_height = self.get_rel_pos(height, height, self.rel_pos_h)
        of_width = self.get_rel_pos(width, width, self.rel_pos_w)
        down = torch.einsum("bnhwc,hkc->bnhwk", pixels, of_height).flatten(2, 3)
        across = torch.einsum("bnhwc,wkc->bnhwk", pixels, of_width).flatten(2, 3)
        rows = torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, 0)
        columns = torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1)
        axes = torch.cat((rows, columns), 1).expand(*key.shape[:2], -1, -1)
        query = torch.cat((query * self.scale, down, across), -1)
        return query, torch.cat((key, axes), -1)


@row("sam", "Sam", "VisionAttention", "attention")
@row("sam_hq", "SamHQ", "VisionAttention", "attention")
class SamVisionEagerAttention(SamVisionAttention):
    """The stock class gives the weights; they are computed where the model collects them."""

    dropout: float

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None) -> Any:
        """`[B, h, w, C]` -> `([B, h, w, C], weights or None)`"""
        if output_attentions or records_attention():
            return super(SamVisionAttention, self).forward(hidden_states, output_attentions)
        return self._attended(hidden_states, self.dropout if self.training else 0.0), None
