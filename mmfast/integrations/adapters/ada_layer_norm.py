"""Adaptive layer norms of the diffusion transformer in Qwen 2.5 Omni, and its blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfast.integrations._attention import PackedMask
from mmfast.integrations._inside import NAME
from mmfast.integrations.adapters.chunks import chunks_of
from mmfast.integrations.adapters.decoders import address
from mmfast.integrations.registry import Adapter, adapter
from mmfast.ops._autograd import in_eager
from mmfast.ops.gated_residual import gated_residual
from mmfast.ops.modulate import modulate

_FOLDER = "qwen2_5_omni"


@adapter(address(_FOLDER, "Qwen2_5_OmniAdaLayerNormZero"), kind="norm")
class AdaLayerNormZero(Adapter):
    """Norm, scale and shift by a condition; hands on what comes after the attention."""

    silu: nn.Module
    linear: nn.Module
    norm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        """`[B, N, C]`, `[B, C]` -> (modulated, gate, shift, scale and gate of the MLP)"""
        chunks = torch.chunk(self.linear(self.silu(emb)), 6, dim=1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = chunks
        out = modulate(hidden_states, scale, shift, norm="layer", eps=self.norm.eps)
        return out, gate, shift_mlp, scale_mlp, gate_mlp


@adapter(address(_FOLDER, "Qwen2_5_OmniAdaLayerNormZero_Final"), kind="norm")
class AdaLayerNormFinal(Adapter):
    """Norm, scale and shift by a condition."""

    silu: nn.Module
    linear: nn.Module
    norm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, emb: Tensor) -> Tensor:
        """`[B, N, C]`, `[B, C]` -> `[B, N, C]`"""
        scale, shift = torch.chunk(self.linear(self.silu(emb)), 2, dim=1)
        out: Tensor = modulate(hidden_states, scale, shift, norm="layer", eps=self.norm.eps)
        return out


@adapter(
    address(_FOLDER, "DiTDecoderLayer"),
    kind="layer",
    relies_on=("DiTAttention", "DiTMLP", "Qwen2_5_OmniAdaLayerNormZero"),
)
class DiTLayer(Adapter):
    """A layer of adaLN-zero. Rows attend within blocks, and one block ahead or back in some layers.

    Those that look no further attend to each block by itself; the mask of the others is made once
    for all items and heads, where the stock layer makes `[B, H, N, N]`.
    """

    attn_norm: nn.Module
    attn: Any
    ff_norm: nn.LayerNorm
    ff: nn.Module
    look_ahead_block: int
    look_backward_block: int

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        position_embeddings: Any = None,
        block_diff: Tensor | None = None,
    ) -> Tensor:
        """`[B, N, C]`; `block_diff`: `[B, H, N, N]`, the key's block minus the row's."""
        if block_diff is None or not in_eager():
            return super().forward(hidden_states, timestep, position_embeddings, block_diff)
        norm, gate, shift_mlp, scale_mlp, gate_mlp = self.attn_norm(hidden_states, emb=timestep)
        branch = self._attention(norm, position_embeddings, block_diff)
        joined = modulate(
            branch, scale_mlp, shift_mlp,
            norm="layer", residual=hidden_states, gate=gate, eps=self.ff_norm.eps,
        )  # fmt: skip
        return gated_residual(joined.h, self.ff(joined.out), gate_mlp, activation="identity")

    def _attention(self, norm: Tensor, position_embeddings: Any, block_diff: Tensor) -> Any:
        batch, length = norm.shape[:2]
        shared = block_diff.stride(0) == 0 and block_diff.stride(1) == 0
        if shared:
            block_diff = block_diff[:1, :1]
        alone = not self.look_ahead_block and not self.look_backward_block
        if alone and shared and self.attn.config._attn_implementation == NAME:
            # Where the blocks of all items, one after the other, begin.
            first = block_diff[0, 0, 0]
            sizes = torch.bincount(first - first.min()).repeat(batch)
            blocks = chunks_of(torch.nn.functional.pad(sizes.cumsum(0), (1, 0)))
            rows = norm.reshape(1, batch * length, -1)
            angles = tuple(
                x.expand(batch, *x.shape[1:]).reshape(1, batch * length, -1)
                for x in position_embeddings
            )
            mask: Any = PackedMask(blocks, blocks)
            out = self.attn(hidden_states=rows, position_embeddings=angles, attention_mask=mask)
            return out.view(batch, length, -1)
        mask = (block_diff >= -float(self.look_backward_block)) & (
            block_diff <= float(self.look_ahead_block)
        )
        return self.attn(
            hidden_states=norm, position_embeddings=position_embeddings, attention_mask=mask
        )
