"""mmfast: fused kernels for the joints of multimodal networks, cross-modal attention and gates.

Importing this package needs neither a compiled library nor triton nor a GPU; the backend is looked
for at the first call.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmfast import planning, reference
from mmfast._version import __version__
from mmfast.dispatch import use_backend
from mmfast.ops.adaptation_gate import adaptation_gate
from mmfast.ops.cross_attention import CrossAttentionOutput, cross_attention
from mmfast.ops.fuse import fuse
from mmfast.ops.gated_residual import gated_residual
from mmfast.ops.glu import glu, glu_packed
from mmfast.ops.modulate import ModulateOutput, modulate
from mmfast.planning import plan, use_plan

if TYPE_CHECKING:
    import mmfast.nn as nn
    from mmfast.integrations import patch, register_attention, unpatch

__all__ = [
    "CrossAttentionOutput",
    "ModulateOutput",
    "__version__",
    "adaptation_gate",
    "cross_attention",
    "fuse",
    "gated_residual",
    "glu",
    "glu_packed",
    "modulate",
    "nn",
    "patch",
    "plan",
    "planning",
    "reference",
    "register_attention",
    "unpatch",
    "use_backend",
    "use_plan",
]


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("mmfast.nn")
    if name in ("patch", "register_attention", "unpatch"):
        return getattr(importlib.import_module("mmfast.integrations"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
