"""`attend` of an attention as a call of the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.nn.packed_tokens import PackedTokens
from mmfast.ops.cross_attention import CrossAttentionOutput


class AttendCall(NamedTuple):
    """What a layer passes to `MultiheadAttention.forward` as the query, and nothing beside it.

    Hooks run, and so does what wraps the module (LoRA, sharding, offloading): calling the method
    would go past them. The result is `(values, None)`.
    """

    values: Tensor
    """`[B, N, C]` or packed `[T, C]`"""
    holding: Callable[[Tensor], Any]
    """`values` -> the stream that `attend` takes."""
    source: Any
    """The context; None: the stream itself."""
    options: dict[str, Any]
    found: dict[str, Any]
    """Where lse, importance and weights go, if `options` ask for any."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the values; wrappers that cast want to know."""
        return self.values.dtype

    def run(self, attention: Any) -> Tensor:
        """`attend` of `attention`; the values of its result."""
        tokens = self.holding(self.values)
        context = tokens if self.source is None else self.source
        result = attention.attend(tokens, context, **self.options)
        if isinstance(result, CrossAttentionOutput):
            self.found.update(lse=result.lse, importance=result.importance, weights=result.weights)
            result = result.out
        return result.values if isinstance(result, PackedTokens) else result
