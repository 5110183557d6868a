"""What a `MultimodalTransformer` returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmfast.nn._attention_maps import Maps


class MultimodalOutput(NamedTuple):
    """What `MultimodalTransformer` returns. Modalities that no item has are not among the keys."""

    logits: dict[str, Tensor]
    """head -> what it gives, `[B, outputs]`"""
    loss: Tensor | None
    """the weighted sum of `losses`; None without targets"""
    losses: dict[str, Tensor]
    """head -> its loss"""
    features: Tensor
    """`[B, d_model]`: what the heads read; 0 for an item that has nothing"""
    streams: dict[str, Tensor]
    """modality -> its tokens after all layers, `[B, N, d_model]`, 0 in padding"""
    modality_weights: Tensor
    """`[B, K]`: the gates of the fusion, 0 where the item lacks the modality"""
    importance: Maps
    """stream -> source -> `[B, layers, heads, N_source]`: which share of the stream's attention,
    averaged over its tokens, each token of the source got"""
    attention: Maps
    """stream -> source -> `[B, layers, N_stream, N_source]`, with "per_head"
    `[B, layers, heads, N_stream, N_source]`"""
    pooling: dict[str, Tensor]
    """modality -> `[B, N]`: which share of the pooled vector each token gave (with the
    importance, for pooling="attention")"""
