"""What is asked of an attention beside its streams: conditions on pairs, and statistics."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Conditions(NamedTuple):
    """What is in padded coordinates of an attention's arguments, named as `cross_attention`'s."""

    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None
    segment_rule: str = "equal"
    mask: Tensor | None = None
    bias: Tensor | None = None
    is_causal: bool = False

    def some(self) -> bool:
        """Is there one?"""
        return (
            self.is_causal
            or self.mask is not None
            or self.bias is not None
            or self.q_segments is not None
            or self.kv_segments is not None
        )

    def within(self, valid: Tensor) -> Conditions:
        """And only where `valid`, which broadcasts to `[B, H, N, M]`."""
        return self._replace(mask=valid if self.mask is None else self.mask & valid)


class Wanted(NamedTuple):
    """Which statistics are asked for beside the result."""

    lse: bool = False
    importance: bool = False
    weights: bool | str = False

    def some(self) -> bool:
        """Is there one?"""
        return bool(self.lse or self.importance or self.weights)
