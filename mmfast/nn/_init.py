"""How the modules start: Xavier-uniform weights, zero biases."""

from __future__ import annotations

import torch
from torch.nn import Linear


def reset_linear(linear: Linear, parts: int = 1) -> None:
    """Xavier-uniform weight and zero bias.

    `parts` is the number of projections whose weights lie one below the other: each is initialised
    as if it were alone.
    """
    with torch.no_grad():
        for weight in linear.weight.chunk(parts):
            torch.nn.init.xavier_uniform_(weight)
        if linear.bias is not None:
            linear.bias.zero_()
