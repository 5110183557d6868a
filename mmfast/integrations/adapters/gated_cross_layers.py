"""Flamingo's layers: cross-attention and an MLP that join the text through tanh gates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.integrations._attention import PackedMask
from mmfast.integrations._layout import Layout
from mmfast.integrations._packing import Arguments, layout_of
from mmfast.integrations._prefill import Prefill
from mmfast.integrations.adapters.decoders import address
from mmfast.integrations.registry import Adapter, adapter
from mmfast.nn._tokens import put_rows
from mmfast.ops.gated_residual import gated_residual


def _rows_of_items(mask: Tensor, layout: Layout) -> Tensor:
    """A mask `[B, 1, N, M]` with its rows where they are in the packed items: `[B, 1, L, M]`."""
    rows = mask[:, 0].expand(layout.batch, -1, -1)
    if not layout.holes:
        return rows[:, None, : layout.max_len]
    item = torch.arange(layout.batch, device=mask.device).repeat_interleave(layout.lens)
    token = torch.arange(layout.total, device=mask.device)
    place = token - layout.cu_seqlens[item] + item * layout.max_len
    packed = put_rows(layout.pack(rows).squeeze(0), place, layout.batch * layout.max_len)
    return packed.unflatten(0, (layout.batch, layout.max_len))[:, None]


def _packed_context(
    context: Tensor, mask: Tensor | None, layout: Layout
) -> tuple[Tensor, PackedMask, Layout]:
    """(`[1, B * M, C]`, what stands for the mask `[B, 1, N, M]`, the layout of the context)

    `context`: `[B, M, C]`, or `[B * S, M / S, C]` with each item's keys in S parts.
    """
    context = context.reshape(1, -1, context.shape[-1])
    whole = Layout.whole(layout.batch, context.shape[1] // layout.batch, context.device)
    rows = None if mask is None else _rows_of_items(mask, layout)
    return context, PackedMask(layout, whole, kv_mask=rows), whole


@adapter(
    address("mllama", "MllamaCrossAttentionDecoderLayer"),
    kind="layer",
    relies_on=("MllamaTextCrossAttention", "MllamaTextMLP", "MllamaTextRMSNorm"),
)
class MllamaCrossAttentionDecoderLayer(Adapter):
    """Text attends to the tiles of its images. Rows before the first image skip the MLP's branch.

    Texts are packed by the mask of the layers' self-attention, which this one is given too.
    """

    input_layernorm: nn.Module
    cross_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module
    cross_attn_attn_gate: nn.Parameter
    cross_attn_mlp_gate: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the stock class."""
        given = Arguments(self, args, kwargs)
        hidden, states = given.get("hidden_states"), given.get("cross_attention_states")
        cache, mask = given.get("past_key_values"), given.get("cross_attention_mask")
        if torch.compiler.is_compiling() or not isinstance(hidden, Tensor):
            return super().forward(*args, **kwargs)
        layout = None
        if states is not None and Prefill.takes(cache):
            layout = layout_of(self, given.get("attention_mask"), hidden)
        rows = given.get("full_text_row_masked_out_mask")
        rows = None if rows is None else rows[:, 0, :, 0] != 0
        if layout is not None:
            hidden = layout.pack(hidden)
            rows = None if rows is None else layout.pack(rows)
            states, mask, whole = _packed_context(states, mask, layout)
            cache = None if cache is None else Prefill(cache, whole)
        read = ("hidden_states", "cross_attention_states", "cross_attention_mask",
                "attention_mask", "full_text_row_masked_out_mask", "position_ids",
                "past_key_values", "use_cache", "position_embeddings")  # fmt: skip
        branch, _ = self.cross_attn(
            hidden_states=self.input_layernorm(hidden),
            attention_mask=mask,
            cross_attention_states=states,
            past_key_values=cache,
            **{name: value for name, value in given.kwargs.items() if name not in read},
        )
        hidden = gated_residual(hidden, branch, self.cross_attn_attn_gate)
        branch = self.mlp(self.post_attention_layernorm(hidden))
        hidden = gated_residual(hidden, branch, self.cross_attn_mlp_gate, row_mask=rows)
        return hidden if layout is None else layout.unpack(hidden)


@adapter(
    address("idefics", "IdeficsGatedCrossAttentionLayer"),
    kind="layer",
    relies_on=("IdeficsAttention", "IdeficsMLP", "IdeficsRMSNorm"),
)
class IdeficsGatedCrossAttentionLayer(Adapter):
    """Text attends to the images it may see; rows that see none skip the attention's branch."""

    input_layernorm: nn.Module
    cross_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module
    alpha_cross_attn: nn.Parameter
    alpha_dense: nn.Parameter
    config: float
    """The probability of dropout, under the name that the stock class has for it."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the stock class."""
        given = Arguments(self, args, kwargs)
        hidden, states = given.get("hidden_states"), given.get("image_hidden_states")
        gate, mask = given.get("cross_attention_gate"), given.get("image_attention_mask")
        refused = states is None or gate is None or given.get("past_key_values") is not None
        if refused or torch.compiler.is_compiling() or not isinstance(hidden, Tensor):
            return super().forward(*args, **kwargs)
        layout = layout_of(self, given.get("attention_mask"), hidden)
        rows = gate != 0
        if layout is not None:
            hidden, rows = layout.pack(hidden), layout.pack(rows)
            states, mask, _ = _packed_context(states, mask, layout)
        read = ("hidden_states", "attention_mask", "image_hidden_states", "image_attention_mask",
                "cross_attention_gate", "past_key_values")  # fmt: skip
        branch, _ = self.cross_attn(
            hidden_states=self.input_layernorm(hidden),
            key_value_states=states,
            attention_mask=mask,
            **{name: value for name, value in given.kwargs.items() if name not in read},
        )
        branch = F.dropout(branch, p=self.config, training=self.training)
        hidden = gated_residual(hidden, branch, self.alpha_cross_attn.flatten(), row_mask=rows)
        branch = self.mlp(self.post_attention_layernorm(hidden))
        branch = F.dropout(branch, p=self.config, training=self.training)
        hidden = gated_residual(hidden, branch, self.alpha_dense.flatten())
        return hidden if layout is None else layout.unpack(hidden)


@adapter(
    address("mllama", "MllamaVisionEncoderLayer"),
    kind="gate",
    relies_on=("MllamaVisionAttention", "MllamaVisionMLP"),
)
class MllamaVisionEncoderLayer(Adapter):
    """A layer of the global vision encoder, with tanh gates.

    Its tiles are not packed: the stock mask lets tokens see the tiles of padding.
    """

    is_gated: bool
    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module
    gate_attn: nn.Parameter
    gate_ffn: nn.Parameter

    def _mmfast_why_not(self) -> str | None:
        return None if self.is_gated else "it has no gates"

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[B, N, C]` -> `[B, N, C]`"""
        if torch.compiler.is_compiling():
            return super().forward(hidden_states, attention_mask)
        branch, _ = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask=attention_mask
        )
        x = gated_residual(hidden_states, branch, self.gate_attn)
        branch = self.mlp(self.post_attention_layernorm(x))
        return gated_residual(x, branch, self.gate_ffn)
