"""Modules over the ops of `mmfast`."""

from __future__ import annotations

from mmfast.nn.ada_layer_norm import AdaLayerNorm, AdaLayerNormZero
from mmfast.nn.adaptation_gate import AdaptationGate
from mmfast.nn.attention_pooling import AttentionPooling, AttentionPoolingOutput
from mmfast.nn.context_cache import ContextCache
from mmfast.nn.cross_modal_attention import CrossModalAttention
from mmfast.nn.cross_modal_encoder import CrossModalEncoder
from mmfast.nn.cross_modal_encoder_layer import CrossModalEncoderLayer, CrossModalOutput
from mmfast.nn.film import FiLM
from mmfast.nn.gated_cross_attention_block import GatedCrossAttentionBlock
from mmfast.nn.gated_fusion import GatedFusion, GatedFusionOutput
from mmfast.nn.gated_mlp import GatedMLP
from mmfast.nn.multihead_attention import MultiheadAttention
from mmfast.nn.multimodal_transformer import MultimodalOutput, MultimodalTransformer
from mmfast.nn.packed_tokens import PackedTokens
from mmfast.nn.projected_context import ProjectedContext
from mmfast.nn.transformer_decoder import TransformerDecoder, TransformerDecoderLayer
from mmfast.nn.transformer_encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "AdaLayerNorm",
    "AdaLayerNormZero",
    "AdaptationGate",
    "AttentionPooling",
    "AttentionPoolingOutput",
    "ContextCache",
    "CrossModalAttention",
    "CrossModalEncoder",
    "CrossModalEncoderLayer",
    "CrossModalOutput",
    "FiLM",
    "GatedCrossAttentionBlock",
    "GatedFusion",
    "GatedFusionOutput",
    "GatedMLP",
    "MultiheadAttention",
    "MultimodalOutput",
    "MultimodalTransformer",
    "PackedTokens",
    "ProjectedContext",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
