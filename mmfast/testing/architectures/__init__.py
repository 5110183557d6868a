"""Small and base-size models of transformers with padded inputs: what drop-in parity is tested on.

One file a family; each holds `@architecture(model_type)` classes (see _case.py).
"""

from __future__ import annotations

from mmfast.testing.architectures._case import (
    Architecture,
    Size,
    all_architectures,
    architecture,
    ragged_mask,
)

__all__ = ["Architecture", "Size", "all_architectures", "architecture", "ragged_mask"]
