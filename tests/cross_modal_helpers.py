"""Cross-modal layers and stacks with loud weights, and streams for them."""

from __future__ import annotations

from typing import Any

import torch
from stack_helpers import (
    FF,
    N_LENS,
    B,
    C,
    H,
    M,
    N,
    padding,
    quiet_norms,
)
from torch import Tensor

from mmfast.nn import (
    CrossModalEncoder,
    CrossModalEncoderLayer,
)

WIDE = 20  # of the memory
N_PAD = padding(N_LENS, N)
MISSING = torch.tensor([4, 0, 7])  # item 1 has no memory
KINDS: dict[str, dict[str, Any]] = {
    "post norm": {},
    "pre norm, swiglu, gate of channels": {
        "norm_first": True, "activation": "swiglu", "gate": "vector",
    },
    "gate of the branch": {"gate": "scalar", "activation": "gelu"},
    "cross only": {"self_attention": False, "activation": torch.tanh},
    "self only": {"cross_attention": False, "norm_first": True},
}  # fmt: skip


def layer(**options: Any) -> CrossModalEncoderLayer:
    options = {"dropout": 0.0, "context_dim": WIDE, **options}
    made = quiet_norms(CrossModalEncoderLayer(C, H, FF, **options))
    if made.cross_gate is not None:
        torch.nn.init.normal_(made.cross_gate)
    return made


def stack(layers: int = 2, **options: Any) -> CrossModalEncoder:
    return CrossModalEncoder(
        [layer(**options) for _ in range(layers)], norm=quiet_norms(torch.nn.LayerNorm(C))
    )


def streams() -> list[Tensor]:
    return [torch.randn(B, N, C), torch.randn(B, M, WIDE)]
