"""The eager meaning of every op: plain torch, any dtype, readable beside the specification."""

from mmfast.reference.cross_attention import CrossAttentionOutput, cross_attention

__all__ = ["CrossAttentionOutput", "cross_attention"]
