"""Argument checks of `MultimodalTransformer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.nn import Module, ModuleDict

from mmfast.nn import _checks
from mmfast.nn._attention_maps import BOTTLENECK
from mmfast.nn._co_attention import PATTERNS

_OP = "MultimodalTransformer"


def check_names(
    encoders: Any, widths: Any, pattern: str, anchor: str | None, heads: Mapping[str, Any]
) -> tuple[str, ...]:
    """The modalities, once every name can be the name of a submodule."""
    for argument, value in (("encoders", encoders), ("widths", widths)):
        if not isinstance(value, Mapping) or not value:
            raise TypeError(
                f"{_OP}: {argument} must be a mapping with at least one modality, got {value!r}; "
                f"as in encoders={{'image': vit}}, widths={{'image': 768}}"
            )
    if set(encoders) != set(widths):
        raise ValueError(
            f"{_OP}: encoders has {sorted(encoders)} and widths {sorted(widths)}; both must have "
            f"the same modalities (the encoder is None where inputs are features)"
        )
    for argument, names in (("encoders", encoders), ("heads", heads)):
        for name in names:
            if not isinstance(name, str) or not name or "." in name or hasattr(ModuleDict, name):
                raise ValueError(
                    f"{_OP}: {argument} has the name {name!r}, which cannot be the name of a "
                    f"submodule; take another (no dot, not an attribute of ModuleDict)"
                )
    for name, encoder in encoders.items():
        if encoder is not None and not isinstance(encoder, Module):
            raise TypeError(
                f"{_OP}: encoders[{name!r}] must be a torch.nn.Module or None, got "
                f"{type(encoder).__name__}; wrap a function in a module"
            )
    _checks.require_choice(_OP, "pattern", pattern, PATTERNS)
    if pattern == "to_anchor":
        if anchor not in widths:
            raise ValueError(
                f"{_OP}: anchor is {anchor!r}; pattern 'to_anchor' needs one of {list(widths)}"
            )
    elif anchor is not None:
        raise ValueError(
            f"{_OP}: anchor is {anchor!r} with pattern {pattern!r}; only 'to_anchor' has one"
        )
    if pattern == "bottleneck" and BOTTLENECK in widths:
        raise ValueError(
            f"{_OP}: a modality is called {BOTTLENECK!r}, as the bottleneck tokens in attention "
            f"maps are; take another name"
        )
    return tuple(widths)


def require_known(argument: str, given: Any, names: Sequence[str]) -> None:
    """ValueError unless all that is given are modalities."""
    for name in given:
        if name not in names:
            raise ValueError(f"{_OP}: {argument} has {name!r}, but modalities are {list(names)}")


def probabilities(given: float | Mapping[str, float], names: Sequence[str]) -> list[float]:
    """`modality_dropout`, one for each modality."""
    if not isinstance(given, Mapping):
        given = dict.fromkeys(names, given)
    require_known("modality_dropout", given, names)
    for name, value in given.items():
        _checks.require_probability(_OP, f"modality_dropout[{name!r}]", value)
    return [float(given.get(name, 0.0)) for name in names]
