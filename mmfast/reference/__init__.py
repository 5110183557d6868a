"""The eager meaning of every op: plain torch, any dtype, readable beside the specification."""

from mmfast.reference.adaptation_gate import adaptation_gate
from mmfast.reference.cross_attention import CrossAttentionOutput, cross_attention
from mmfast.reference.fuse import fuse
from mmfast.reference.gated_residual import gated_residual
from mmfast.reference.glu import glu, glu_packed
from mmfast.reference.modulate import ModulateOutput, modulate

__all__ = [
    "CrossAttentionOutput",
    "ModulateOutput",
    "adaptation_gate",
    "cross_attention",
    "fuse",
    "gated_residual",
    "glu",
    "glu_packed",
    "modulate",
]
