"""Drop-in: one call speeds up models of torch.nn and Hugging Face transformers, one takes it back.

Nothing here is imported by the rest of mmfast, and nothing is patched by importing it.
"""

from __future__ import annotations

from mmfast.integrations._interface import register_attention
from mmfast.integrations.patching import patch, unpatch
from mmfast.integrations.report import Left, Report, Swapped

__all__ = ["Left", "Report", "Swapped", "patch", "register_attention", "unpatch"]
