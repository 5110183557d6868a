"""Hard-coded attentions of resamplers and aligners: idefics, evolla, aria."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfast.integrations._attention import PackedMask, attend
from mmfast.integrations.adapters.decoders import address
from mmfast.integrations.registry import Adapter, adapter
from mmfast.ops.gated_residual import gated_residual


def _heads(x: Tensor, heads: int) -> Tensor:
    """`[B, N, H * D]` -> `[B, H, N, D]`"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@adapter("transformers.models.idefics.perceiver.IdeficsPerceiverAttention", kind="attention")
class IdeficsPerceiverAttention(Adapter):
    """Latents attend to a context and to themselves."""

    context_layer_norm: nn.Module
    latents_layer_norm: nn.Module
    q_layer_norm: nn.Module
    k_layer_norm: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    output_proj: nn.Module
    n_heads: int
    qk_layer_norms: bool
    qk_scale: float

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """`[B, M, C]`, `[B, N, C]` -> `[B, N, C]`"""
        context, latents = self.context_layer_norm(context), self.latents_layer_norm(latents)
        both = torch.cat((context, latents), dim=-2)
        q, k, v = (
            _heads(project(x), self.n_heads)
            for project, x in ((self.q_proj, latents), (self.k_proj, both), (self.v_proj, both))
        )
        if self.qk_layer_norms:
            q, k = self.q_layer_norm(q), self.k_layer_norm(k)
        out, _ = attend(self, q, k, v, None, scaling=self.qk_scale)
        return self.output_proj(out.flatten(2))


@adapter(address("evolla", "EvollaSequenceCompressorAttention"), kind="attention")
class EvollaSequenceCompressorAttention(Adapter):
    """Latents attend to a protein `[B, M, C]`, padded by a mask, and to themselves.

    The latents come first here, so that the padding is on the right; attention does not mind.
    """

    norm_media: nn.Module
    norm_latents: nn.Module
    to_q: nn.Module
    to_kv: nn.Module
    to_out: nn.Module
    heads: int
    scale: float

    def forward(self, x: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
        """`mask`: `[B, M + N]`, 1 for a token, the latents' at its end."""
        x, latents = self.norm_media(x), self.norm_latents(latents)
        q = _heads(self.to_q(latents), self.heads)
        kv = self.to_kv(torch.cat((latents, x), dim=-2))
        k, v = (_heads(half, self.heads) for half in kv.chunk(2, dim=-1))
        length = x.shape[1]
        seen = torch.cat((mask[:, length:], mask[:, :length]), dim=1) == 1
        out, _ = attend(self, q, k, v, seen, scaling=self.scale)
        return self.to_out(out.flatten(2))


@adapter(
    address("evolla", "EvollaSequenceAlignerCrossAttention"),
    kind="gate",
    relies_on=("EvollaFeedForward", "EvollaRMSNorm"),
)
class EvollaSequenceAligner(Adapter):
    """Text attends to up to three sources at once and joins through tanh gates."""

    _mmfast_takes_packed_rows = True

    query: nn.Module
    attention_norm: nn.Module
    out_proj: nn.Module
    ff: nn.Module
    gate_attention: nn.Parameter
    gate_ffw: nn.Parameter
    num_attention_heads: int
    scale: float

    def forward(
        self,
        query_states: Tensor,
        protein_kv_states: Tensor | None,
        structure_kv_states: Tensor | None,
        msa_kv_states: Tensor | None,
        query_attn_mask: Any,
        protein_kv_attn_mask: Tensor | None = None,
        structure_kv_attn_mask: Tensor | None = None,
        msa_kv_attn_mask: Tensor | None = None,
        protein_batch_mask: Tensor | None = None,
        structure_batch_mask: Tensor | None = None,
        msa_batch_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """`query_states` `[B, N, C]`, or `[1, T, C]` with a `PackedMask` for `query_attn_mask`."""
        sources = []
        for name, states, mask, items in (
            ("protein", protein_kv_states, protein_kv_attn_mask, protein_batch_mask),
            ("structure", structure_kv_states, structure_kv_attn_mask, structure_batch_mask),
            ("msa", msa_kv_states, msa_kv_attn_mask, msa_batch_mask),
        ):
            if states is not None:
                if mask is None:
                    assert items is not None
                    mask = items[:, None].expand(states.shape[:2])
                sources.append((name, states.to(query_states), mask == 1))
        seen = torch.cat([mask for _, _, mask in sources], dim=1) if sources else None
        if seen is None or not bool(seen.any()):
            return query_states
        keys, values = [], []
        for name, states, _ in sources:
            project = getattr(self, f"key_{name}")
            if project is not None:
                keys.append(project(states))
                values.append(getattr(self, f"value_{name}")(states))
        q = _heads(self.query(self.attention_norm(query_states)), self.num_attention_heads)
        k, v = (_heads(torch.cat(x, dim=1), self.num_attention_heads) for x in (keys, values))
        keys_seen: Any = seen[:, None, None, :]
        if isinstance(query_attn_mask, PackedMask):
            keys_seen = query_attn_mask._replace(kv_mask=keys_seen)
        out, _ = attend(self, q, k, v, keys_seen, scaling=self.scale)
        x = gated_residual(query_states, self.out_proj(out.flatten(2)), self.gate_attention)
        return gated_residual(x, self.ff(x), self.gate_ffw)


@adapter(address("aria", "AriaCrossAttention"), kind="attention")
class AriaCrossAttention(Adapter):
    """The projector's, which reads no attention weights: its nn.MultiheadAttention makes none."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    multihead_attn: nn.Module
    linear: nn.Module
    dropout: nn.Module
    layer_norm: nn.Module
    layer_norm_kv: nn.Module

    def forward(
        self, key_value_states: Tensor, hidden_states: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        """`attn_mask`: as `nn.MultiheadAttention` has it, True = masked."""
        query = self.q_proj(self.layer_norm(hidden_states))
        key_value_states = self.layer_norm_kv(key_value_states)
        out, _ = self.multihead_attn(
            query,
            self.k_proj(key_value_states),
            self.v_proj(key_value_states),
            attn_mask=attn_mask,
            need_weights=False,
        )
        return self.dropout(self.linear(out))
