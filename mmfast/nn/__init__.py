"""Modules over the ops of `mmfast`."""

from __future__ import annotations

from mmfast.nn.ada_layer_norm import AdaLayerNorm, AdaLayerNormZero
from mmfast.nn.adaptation_gate import AdaptationGate
from mmfast.nn.cross_modal_attention import CrossModalAttention
from mmfast.nn.film import FiLM
from mmfast.nn.gated_cross_attention_block import GatedCrossAttentionBlock
from mmfast.nn.gated_fusion import GatedFusion, GatedFusionOutput
from mmfast.nn.gated_mlp import GatedMLP
from mmfast.nn.multihead_attention import MultiheadAttention
from mmfast.nn.packed_tokens import PackedTokens
from mmfast.nn.projected_context import ProjectedContext

__all__ = [
    "AdaLayerNorm",
    "AdaLayerNormZero",
    "AdaptationGate",
    "CrossModalAttention",
    "FiLM",
    "GatedCrossAttentionBlock",
    "GatedFusion",
    "GatedFusionOutput",
    "GatedMLP",
    "MultiheadAttention",
    "PackedTokens",
    "ProjectedContext",
]
