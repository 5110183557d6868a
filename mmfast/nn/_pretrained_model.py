"""`MultimodalTransformer` as a configuration, and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Identity, Module

from mmfast.nn import _pretrained

Folder = str | os.PathLike[str]


class LostLoss:
    """In place of a loss that was a function: the model works, but cannot be trained."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Raise: what the loss was is not known."""
        raise ValueError(
            f"MultimodalTransformer: the loss of head {self.name!r} was a function, which "
            f"save_pretrained does not keep; give it again: "
            f"from_pretrained(..., losses={{{self.name!r}: function}})"
        )


def save(
    op: str, model: Module, config: Mapping[str, Any], folder: Folder, include_encoders: bool
) -> None:
    """Configuration and weights of `model` into `folder`."""
    losses = {k: v if isinstance(v, str) else None for k, v in config["losses"].items()}
    activation = config["activation"] if isinstance(config["activation"], str) else None
    encoders: Any = model.encoders
    own = next(p for name, p in model.named_parameters() if name.startswith("alignments."))
    state = {
        name: value
        for name, value in model.state_dict().items()
        if include_encoders or not name.startswith("encoders.")
    }
    whole = {
        "dtype": _pretrained.dtype_name(own.dtype),
        "encoders_saved": include_encoders,
        "features": [name for name, part in encoders.items() if isinstance(part, Identity)],
        "model": {**config, "losses": losses, "activation": activation},
    }
    _pretrained.save(op, folder, whole, state)


def arguments(
    op: str,
    folder: Folder,
    encoders: Mapping[str, Module | None] | None,
    registry: Mapping[str, Callable[..., Module]] | None,
    heads: Mapping[str, Module] | None,
    losses: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What the constructor needs to make the model of `folder` again."""
    config = _pretrained.load_config(op, folder)
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("widths"), dict):
        raise ValueError(f"{op}.from_pretrained: the configuration in {folder} is not whole")
    found: dict[str, Any] = {**model, "dtype": _pretrained.dtype_of(op, config.get("dtype"))}
    found["encoders"] = {
        name: _encoder(op, name, config, encoders or {}, registry or {}) for name in model["widths"]
    }
    for argument, given, kept in (
        ("encoders", encoders, model["widths"]),
        ("heads", heads, model["heads"]),
        ("losses", losses, model["heads"]),
    ):
        for name in given or {}:
            if name not in kept:
                raise ValueError(
                    f"{op}.from_pretrained: {argument} has {name!r}, but the model has {list(kept)}"
                )
    found["heads"] = {**model["heads"], **(heads or {})}
    for name, head in found["heads"].items():
        if head is None:
            raise ValueError(
                f"{op}.from_pretrained: head {name!r} was a module; give it again: "
                f"heads={{{name!r}: module}}"
            )
    found["losses"] = {
        **{k: LostLoss(k) if v is None else v for k, v in model["losses"].items()},
        **(losses or {}),
    }
    found |= options
    if found["activation"] is None:
        raise ValueError(
            f"{op}.from_pretrained: the activation was a function, which save_pretrained does not "
            f"keep; give it again: activation=function"
        )
    return found


def load(op: str, model: Module, folder: Folder) -> None:
    """The weights in `folder` into `model`."""
    config = _pretrained.load_config(op, folder)
    optional = () if config.get("encoders_saved", True) else ("encoders.",)
    _pretrained.load_state(op, folder, model, config, optional)


def _encoder(
    op: str,
    name: str,
    config: Mapping[str, Any],
    encoders: Mapping[str, Module | None],
    registry: Mapping[str, Callable[..., Module]],
) -> Module | None:
    if name in encoders:
        return encoders[name]
    if name in config.get("features", ()):
        return None
    spec = config["model"].get("encoder_specs", {}).get(name)
    if spec is None:
        raise ValueError(
            f"{op}.from_pretrained: modality {name!r} had an encoder; give it again: "
            f"encoders={{{name!r}: module}}"
        )
    options = dict(spec)
    kind = options.pop("kind", None)
    if kind not in registry:
        raise ValueError(
            f"{op}.from_pretrained: modality {name!r} has an encoder of kind {kind!r}, but "
            f"registry has {list(registry)}; add a function that builds it, or pass encoders"
        )
    return registry[kind](**options)
