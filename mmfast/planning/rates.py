"""How long a piece of work takes on a machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmfast.planning.costs import Piece


@dataclass(frozen=True)
class Rates:
    """What a machine does: FLOP/s of its products, bytes/s of its memory, seconds of a call."""

    flops: float
    bandwidth: float
    call: float
    attention: float = 0.4
    shared: float = 0.6

    def seconds(self, piece: Piece) -> float:
        """The modelled time of a piece of work."""
        rate = self.flops
        if piece.kind == "attention":
            rate *= self.attention
        elif piece.kind == "shared":
            rate *= self.shared
        return max(piece.flops / rate, piece.bytes_ / self.bandwidth) + piece.calls * self.call


def rates_for(dtype: torch.dtype, device: torch.device, threads: int) -> Rates:
    """The rates of this machine: those that are assumed."""
    if device.type == "cpu":
        low = dtype in (torch.bfloat16, torch.float16)
        return Rates((160e9 if low else 80e9) * threads, 10e9 * min(threads, 8), 6e-6)
    low = dtype in (torch.bfloat16, torch.float16)
    return Rates(400e12 if low else 40e12, 2e12, 6e-6)
