"""What a case of an architecture is, and the list of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Size = Literal["tiny", "base"]


@dataclass(frozen=True)
class Architecture:
    """A model of transformers: how to build it, what to feed it, what to compare.

    `build("tiny")` gives the stock model with small random weights (the harness sets strong ones)
    and two layers or so; `build("base")`, where `sizes` has it, one of the published base size.
    `inputs(model, size)` is a padded batch: keyword arguments of the model's forward.
    `outputs(result, inputs)` picks named tensors of a result, without the rows of padding.
    """

    model_type: str
    build: Callable[[Size], nn.Module]
    inputs: Callable[[Any, Size], dict[str, Any]]
    outputs: Callable[[Any, Mapping[str, Any]], dict[str, Tensor]]
    calls: int
    """Attentions of one forward that go through `mmfast.cross_attention`."""
    packed: int = 0
    """Layers of one forward that leave out padding."""
    sizes: tuple[Size, ...] = ("tiny",)
    generate: Mapping[str, Any] | None = None
    """Arguments of `model.generate(**prompt, **generate)`; None: the model does not generate."""
    prompt: Callable[[Any], dict[str, Any]] | None = None
    """What generate() starts from; the forward's inputs where None."""
    double: bool = True
    """Whether the stock model runs in float64 (else float32 is the truth, judged by size)."""
    without_gradient: tuple[str, ...] = ()
    """Ends of parameter names that get no gradient from these outputs, in the stock model too."""


_ARCHITECTURES: dict[str, Architecture] = {}


def architecture(model_type: str, **facts: Any) -> Callable[[type], type]:
    """Register a class with the static methods build, inputs, outputs (and prompt) as a case."""

    def register(cls: type) -> type:
        if model_type in _ARCHITECTURES:
            raise ValueError(f"architecture: {model_type!r} is there twice; use another name")
        methods = {name: getattr(cls, name) for name in ("build", "inputs", "outputs")}
        _ARCHITECTURES[model_type] = Architecture(
            model_type, **methods, prompt=getattr(cls, "prompt", None), **facts
        )
        return cls

    return register


def all_architectures() -> dict[str, Architecture]:
    """Every case by its model_type, in alphabetical order. Needs transformers to build them."""
    package = importlib.import_module("mmfast.testing.architectures")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"mmfast.testing.architectures.{module.name}")
    return dict(sorted(_ARCHITECTURES.items()))


def ragged_mask(
    batch: int, length: int, valid: float = 0.6, *, side: Literal["right", "left"] = "right"
) -> Tensor:
    """`[batch, length]` int64, 1 = token: one item is full, the lengths' mean is valid * length."""
    if batch == 1:
        lens = torch.tensor([length])
    else:
        spread = torch.linspace(1.0, max(0.0, 2 * valid - 1), batch)
        lens = (spread * length).round().clamp(min=1).long()
    mask = (torch.arange(length) < lens[:, None]).long()
    return mask if side == "right" else mask.flip(1)
