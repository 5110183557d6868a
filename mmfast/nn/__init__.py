"""Modules over the ops of `mmfast`."""

from __future__ import annotations

from mmfast.nn.cross_modal_attention import CrossModalAttention
from mmfast.nn.multihead_attention import MultiheadAttention

__all__ = ["CrossModalAttention", "MultiheadAttention"]
