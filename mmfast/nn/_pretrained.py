"""A model in a folder: `config.json` and `model.safetensors`. Nothing in it is code, or pickle."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from mmfast._version import __version__

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_FORMAT = 1


def save(
    op: str, folder: str | os.PathLike[str], config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Write both files, each whole or not at all."""
    safetensors = _safetensors(f"{op}.save_pretrained")
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{op}.save_pretrained: the state dict entry {name!r} is a "
                f"{type(value).__name__}; a safetensors file holds tensors alone"
            )
        # safetensors refuses tensors that share memory, as tied weights do.
        place = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() > 0 and not value.is_meta and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            kept[name] = value.detach().to("cpu").contiguous()
    kept = {name: value.clone() if _is_part(value) else value for name, value in kept.items()}
    whole = {"format": _FORMAT, "class": op, "mmfast": __version__, **config, "aliases": aliases}
    try:
        text = json.dumps(whole, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{op}.save_pretrained: the configuration does not fit into JSON: {error}; "
            f"encoder_specs may hold strings, numbers, booleans, None, lists and dicts of them"
        ) from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS, lambda path: safetensors.save_file(kept, path, {"format": "pt"}))
    _replace(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def load_config(op: str, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save` was given as config."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{op}.from_pretrained: there is no {CONFIG} in {folder}; give the folder that "
            f"save_pretrained wrote"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{op}.from_pretrained: {path} is not JSON: {error}") from error
    kind = config.get("class") if isinstance(config, dict) else None
    if kind != op:
        raise ValueError(f"{op}.from_pretrained: {path} describes {kind!r}, expected {op!r}")
    if config.get("format") != _FORMAT:
        raise ValueError(
            f"{op}.from_pretrained: {path} has format {config.get('format')!r}, this version of "
            f"mmfast ({__version__}) reads {_FORMAT}; it was written by {config.get('mmfast')!r}"
        )
    return config


def load_state(
    op: str,
    folder: str | os.PathLike[str],
    model: Module,
    config: Mapping[str, Any],
    optional: tuple[str, ...],
) -> None:
    """Fill `model`; parameters whose names begin with one of `optional` may be missing."""
    safetensors = _safetensors(f"{op}.from_pretrained")
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{op}.from_pretrained: there is no {WEIGHTS} in {folder}")
    state = safetensors.load_file(path, device="cpu")
    for name, original in config.get("aliases", {}).items():
        if original in state:
            state[name] = state[original]
    wanted = model.state_dict()
    missing = [n for n in wanted if n not in state and not n.startswith(optional)]
    unknown = [n for n in state if n not in wanted]
    shapes = [
        f"{n} {list(state[n].shape)} for {list(wanted[n].shape)}"
        for n in wanted
        if n in state and state[n].shape != wanted[n].shape
    ]
    problems = (
        ("lacks {}", missing),
        ("has {}, which the model does not have", unknown),
        ("has other shapes: {}", shapes),
    )
    found = [sentence.format(_some(names)) for sentence, names in problems if names]
    if found:
        raise ValueError(
            f"{op}.from_pretrained: {path} {'; it '.join(found)}. Pass the encoders and heads that "
            f"the model was saved with"
        )
    model.load_state_dict(state, strict=False)


def _safetensors(caller: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{caller}: weights are kept in safetensors files, and the package safetensors is not "
            f"installed; pip install safetensors"
        ) from error
    return safetensors.torch


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """A reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _is_part(value: Tensor) -> bool:
    """Of a larger storage, which safetensors would take for shared memory."""
    return value.untyped_storage().nbytes() != value.numel() * value.element_size()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32" """
    return str(dtype).removeprefix("torch.")


def dtype_of(op: str, name: Any) -> torch.dtype:
    """The inverse, of floating dtypes alone."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{op}.from_pretrained: {name!r} is no floating-point dtype")
    return dtype
