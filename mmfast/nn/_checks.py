"""Argument checks of the modules: each message names module, argument, expected, got and remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def require_sizes(module: str, **sizes: int | None) -> None:
    """ValueError unless every size that is given is at least 1."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{module}: {name} is {size}; it must be at least 1")


def require_choice(module: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        *most, last = (repr(choice) for choice in choices)
        allowed = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(f"{module}: {name} is {value!r}; it must be {allowed}")


def require_probability(module: str, name: str, value: float) -> None:
    """ValueError unless 0 <= value < 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(
            f"{module}: {name} is {value}, expected 0 <= {name} < 1; "
            f"it is the probability that an element is dropped"
        )


def require_stream(
    module: str, name: str, value: Any, width: int, argument: str, dims: int | None = None
) -> None:
    """TypeError or ValueError unless `value` is a dense tensor of this width.

    `argument` is the constructor's name for the width; `dims` is the number of dims, where it is
    fixed.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{module}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(
            f"{module}: {name} must be a dense tensor, got a nested one; pad it "
            f"(torch.nested.to_padded_tensor) and pass its lengths"
        )
    if dims is not None and value.dim() != dims:
        raise ValueError(
            f"{module}: {name} has {value.dim()} dims (shape {list(value.shape)}), expected "
            f"[batch, tokens, {width}]; add the missing dims with unsqueeze"
        )
    if value.dim() == 0:
        raise ValueError(f"{module}: {name} has no dims, expected [..., {width}]; unsqueeze it")
    if value.shape[-1] != width:
        raise ValueError(
            f"{module}: {name} has width {value.shape[-1]} but the module was made for "
            f"{argument}={width}; both must match"
        )


def require_weight_dtype(module: str, weight: Any, **streams: Tensor | None) -> None:
    """TypeError unless every stream has the dtype of the weights or autocast reconciles them.

    What a quantised weight (or the method that torch.ao has in its place) takes is its own affair.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return
    given = {name: stream for name, stream in streams.items() if stream is not None}
    if all(stream.dtype == weight.dtype for stream in given.values()):
        return
    device = weight.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return
    (first, stream), *others = given.items()
    got = " and ".join(
        [f"{first} has dtype {stream.dtype}", *(f"{name} {other.dtype}" for name, other in others)]
    )
    raise TypeError(
        f"{module}: {got}, but the weights are {weight.dtype}; "
        f"convert one of them, or use torch.autocast"
    )


def require_lens(module: str, name: str, lens: Any, stream: Tensor) -> None:
    """TypeError or ValueError unless `lens` holds one integer for each item of `stream`."""
    if not isinstance(lens, Tensor):
        raise TypeError(
            f"{module}: {name} must be a torch.Tensor, got {type(lens).__name__}; "
            f"convert it with torch.as_tensor"
        )
    if lens.is_floating_point() or lens.is_complex() or lens.dtype == torch.bool:
        raise TypeError(
            f"{module}: {name} must be an integer tensor, got {lens.dtype}; it counts the valid "
            f"rows of each item"
        )
    if lens.shape != stream.shape[:1]:
        raise ValueError(
            f"{module}: {name} has shape {list(lens.shape)}, expected [{stream.shape[0]}]; "
            f"give one integer for each item of the batch"
        )
    if lens.device != stream.device:
        raise ValueError(
            f"{module}: {name} is on {lens.device} but the module's inputs are on "
            f"{stream.device}; move all tensors to one device"
        )


def require_condition(module: str, x: Tensor, cond: Tensor) -> None:
    """ValueError unless `cond` is one vector an item, `[B, D]`, or broadcasts to the rows of x."""
    rows, wanted = x.shape[:-1], cond.shape[:-1]
    per_item = cond.dim() == 2 and x.dim() >= 2 and wanted[0] in (1, rows[0])
    per_row = cond.dim() == x.dim() and all(
        got in (1, size) for got, size in zip(wanted, rows, strict=True)
    )
    if not (per_item or per_row):
        raise ValueError(
            f"{module}: cond has shape {list(cond.shape)} but x has shape {list(x.shape)}; give "
            f"one vector for each item [B, {cond.shape[-1]}], or one for each row of x"
        )


def require_present(module: str, present: Any, stream: Tensor, count: int) -> None:
    """TypeError or ValueError unless `present` is bool `[B, count]` or `[B, ..., count]`."""
    if not isinstance(present, Tensor):
        raise TypeError(
            f"{module}: present must be a torch.Tensor, got {type(present).__name__}; "
            f"convert it with torch.as_tensor"
        )
    if present.dtype != torch.bool:
        raise TypeError(
            f"{module}: present must be a bool tensor, got {present.dtype}; True = the modality is "
            f"there: convert it with present != 0"
        )
    if present.device != stream.device:
        raise ValueError(
            f"{module}: present is on {present.device} but the module's inputs are on "
            f"{stream.device}; move all tensors to one device"
        )
    leading = stream.shape[:-1]
    by_item, by_row = [*leading[:1], count], [*leading, count]
    if list(present.shape) not in (by_item, by_row):
        raise ValueError(
            f"{module}: present has shape {list(present.shape)}, expected {by_item} (one for each "
            f"item and modality) or {by_row} (one for each row and modality)"
        )
