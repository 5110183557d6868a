"""Vision and sound encoders whose rows are those of all images, windows or chunks, packed.

The stock classes call their attention once for each chunk and put the results together: a Qwen 2.5
image of 1000 patches has 16 windows in each of 28 layers. Here it is one call for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.integrations._inside import records_attention
from mmfast.integrations._interface import CHUNKS, NAME
from mmfast.integrations._layout import Layout
from mmfast.integrations._masks import remembered
from mmfast.integrations.adapters.decoders import address
from mmfast.integrations.registry import Adapter, adapter
from mmfast.ops._autograd import in_eager


def chunks_of(cu_seqlens: Tensor) -> Layout:
    """The layout of packed chunks by where they begin, `[chunks + 1]`."""

    def read() -> Layout:
        lens = cu_seqlens.diff()
        longest = int(lens.max()) if len(lens) else 0
        return Layout.of(torch.arange(longest, device=lens.device) < lens[:, None])

    return remembered(cu_seqlens, "chunks", read)


@adapter(
    address("qwen2_5_omni", "Qwen2_5OmniAudioAttention"),
    address("qwen2_5_omni", "Qwen2_5OmniVisionAttention"),
    address("qwen2_5_vl", "Qwen2_5_VLVisionAttention"),
    address("qwen2_vl", "VisionAttention"),
    address("qwen3_vl", "Qwen3VLVisionAttention"),
    kind="attention",
)
class ChunkedAttention(Adapter):
    """The stock class told of one chunk; the attention function learns of all of them."""

    config: Any

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`[T, C]`, `[chunks + 1]` -> `[T, C]`"""
        if (
            self.config._attn_implementation != NAME
            or not in_eager()
            or len(cu_seqlens) <= 2
            or records_attention()
        ):
            return super().forward(hidden_states, cu_seqlens, *args, **kwargs)
        kwargs[CHUNKS] = chunks_of(cu_seqlens)
        whole = torch.tensor([0, hidden_states.shape[0]])
        return super().forward(hidden_states, whole, *args, **kwargs)
