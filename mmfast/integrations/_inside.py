"""What is inside a layer, and whether it can be given rows without padding."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from torch import nn

from mmfast.integrations._swapped import stock_of
from mmfast.integrations.registry import adapter_for

NAME = "mmfast"
"""The attention implementation, as transformers knows it."""

LEFT_ALONE = "_mmfast_left_alone"
"""Flag on modules that look their attention up by name and that `patch(exclude=...)` names."""

# What these install on modules inside a layer does not mind packed rows.
_TOLERANT_HOOKS = ("torch.", "transformers.", "accelerate.", "mmfast.")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def chooses_by_name(module: nn.Module) -> bool:
    """Whether a module's forward asks transformers for an attention by its config's name."""
    cls: Any = type(module)
    return _looks_up(cls)


@functools.cache
def _looks_up(cls: Any) -> bool:
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


@functools.cache
def _is_stock_attention(cls: Any) -> bool:
    """An attention that is exchanged for one of ours, where a patch reaches it."""
    row = adapter_for(cls)
    return row is not None and row.kind == "attention"


def recorded() -> tuple[str, ...]:
    """What transformers collects in the forward that is running: "attentions", ..."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    return () if collector is None else tuple(collector.get() or ())


def records_attention() -> bool:
    """Whether it collects attention weights."""
    return any("attention" in key for key in recorded())


def minds_packed_rows(layer: nn.Module) -> bool:
    """Whether anything inside has to see padding.

    Hooks of the user's on modules inside; anything but hidden states recorded (these are recorded
    outside of layers); an attention that is not ours: excluded from the patch, or of a model that
    was given another implementation since.
    """
    for module in layer.modules():
        if module is not layer and _has_foreign_hooks(module):
            return True
        if chooses_by_name(module):
            name = getattr(module.__dict__.get("config"), "_attn_implementation", NAME)
            if name != NAME or LEFT_ALONE in module.__dict__:
                return True
        elif stock_of(module) is None:
            cls: Any = type(module)
            if _is_stock_attention(cls):
                return True
    return any(not key.startswith(("hidden_states", "_")) for key in recorded())


def _has_foreign_hooks(module: nn.Module) -> bool:
    for name in _HOOKS:
        hooks = module.__dict__.get(name)
        if hooks and not all(
            (getattr(hook, "__module__", "") or "").startswith(_TOLERANT_HOOKS)
            for hook in hooks.values()
        ):
            return True
    return False
