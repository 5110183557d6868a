"""Brings the tensors of a gate into the form that its kernels take, without copies where possible.

Data `[B, ..., C]` becomes `[B, N, C]` with dense channels, N the product of the dims between. What
stands beside it (gates, scales, masks) keeps its size-1 dims.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmfast.ops import _checks


def to_rows(x: Tensor) -> Tensor:
    """`[..., C]` -> `[B, N, C]`, the last dim dense."""
    rank = x.dim()
    if rank == 3 and x.is_contiguous():
        return x
    if rank == 2:
        x = x.unsqueeze(1)
    elif rank == 1:
        x = x[None, None]
    elif rank > 3:
        x = x.flatten(1, -2)
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def side_to_rows(side: Tensor, rank: int, middle: tuple[int, ...]) -> Tensor:
    """`[]`, `[C]`, `[B, C]` or `[B, ..., C]` with any dim 1 -> `[B or 1, N or 1, C or 1]`.

    `rank` is that of the data, `middle` its dims between the first and the last.
    """
    have = side.dim()
    if have == 3 and rank == 3:
        return side
    if have < 2:
        return side.reshape(1, 1, -1)
    if have == 2 or rank == 2:
        return side.unsqueeze(1)
    between = side.shape[1:-1]
    if between != middle and math.prod(between) != 1:
        side = side.expand(side.shape[0], *middle, side.shape[-1])
    return side.flatten(1, -2)


def mask_to_rows(mask: Tensor, rank: int, middle: tuple[int, ...]) -> Tensor:
    """bool over rows `[B, ...]` with any dim 1 -> `[B or 1, N or 1]`."""
    if mask.dim() == 0:
        return mask.reshape(1, 1)
    return side_to_rows(mask.unsqueeze(-1), rank, middle).squeeze(-1)


# --- checks ------------------------------------------------------------------------------------


def require_data(op: str, name: str, x: Any) -> None:
    """TypeError or ValueError unless `x` is a floating-point tensor with channels."""
    _checks.require_tensor(op, name, x)
    if x.dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {name} has dtype {x.dtype}, expected float32, bfloat16, float16 or float64; "
            f"convert it with .float()"
        )
    if x.dim() < 1:
        raise ValueError(f"{op}: {name} has shape [], expected [..., C]; give it a dim of channels")


def require_like(op: str, name: str, value: Any, first: str, x: Tensor) -> None:
    """TypeError or ValueError unless `value` has the shape, dtype and device of `x`."""
    _checks.require_tensor(op, name, value)
    if value.shape != x.shape:
        raise ValueError(
            f"{op}: {name} has shape {_checks.shape_text(value)} but {first} has "
            f"{_checks.shape_text(x)}; both must match; project or expand one to the other"
        )
    if value.dtype != x.dtype:
        raise TypeError(
            f"{op}: {name} has dtype {value.dtype} but {first} has {x.dtype}; both must match; "
            f"convert it with .to({first}.dtype) or use autocast"
        )
    if value.device != x.device:
        raise ValueError(
            f"{op}: {name} is on {value.device} but {first} is on {x.device}; "
            f"move all tensors to one device"
        )


def require_side(op: str, name: str, side: Any, first: str, x: Tensor) -> None:
    """TypeError or ValueError unless `side` is a tensor beside x: its dtype, or float32."""
    _checks.require_tensor(op, name, side)
    if side.dtype != x.dtype and (side.dtype != torch.float32 or x.dtype == torch.float64):
        also = " or torch.float32" if x.dtype.itemsize == 2 else ""
        raise TypeError(
            f"{op}: {name} has dtype {side.dtype}, expected {x.dtype}{also}, as {first} has; "
            f"convert it with .to({first}.dtype)"
        )
    if side.device != x.device:
        raise ValueError(
            f"{op}: {name} is on {side.device} but {first} is on {x.device}; "
            f"move all tensors to one device"
        )


def lines_up(side: Tensor, x: Tensor, channels: int) -> bool:
    """Is `side` `[c]`, `[B or 1, c]` or of x's rank with every dim that of x or 1?

    c is C, or 1 where `channels` is 1.
    """
    have, want, rank = side.shape, x.shape, x.dim()
    if len(have) == 0:
        return channels == 1
    if have[-1] != want[-1] and not (channels == 1 and have[-1] == 1):
        return False
    if len(have) == 1:
        return True
    if len(have) == 2 and rank > 2:
        return have[0] == want[0] or have[0] == 1
    return len(have) == rank and all(
        got == full or got == 1 for got, full in zip(have[:-1], want[:-1], strict=True)
    )


def require_channels(op: str, name: str, side: Any, first: str, x: Tensor) -> None:
    """`require_side`, and ValueError unless the shape is [C]."""
    require_side(op, name, side, first, x)
    if side.dim() != 1 or side.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{op}: {name} has shape {_checks.shape_text(side)}, expected [C] = "
            f"[{x.shape[-1]}]; it holds one value for each channel"
        )


def require_row_mask(op: str, row_mask: Any, first: str, x: Tensor) -> None:
    """TypeError or ValueError unless `row_mask` is bool over the rows of x."""
    _checks.require_tensor(op, "row_mask", row_mask)
    if row_mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: row_mask must be bool (True = the row takes part), got {row_mask.dtype}; "
            f"convert it with .bool()"
        )
    if row_mask.device != x.device:
        raise ValueError(
            f"{op}: row_mask is on {row_mask.device} but {first} is on {x.device}; "
            f"move all tensors to one device"
        )
    rows = x.shape[:-1]
    if row_mask.dim() != len(rows) or any(
        got != want and got != 1 for got, want in zip(row_mask.shape, rows, strict=True)
    ):
        wanted = "[" + ", ".join(str(size) for size in rows) + "]"
        raise ValueError(
            f"{op}: row_mask has shape {_checks.shape_text(row_mask)}, expected {wanted} or 1 in "
            f"place of any size; it holds one bool for each row of {first}"
        )


# --- autocast ----------------------------------------------------------------------------------


def autocast_on(x: Any) -> bool:
    """Is autocast on for the device of `x`? Meta tensors follow the CPU's."""
    if not isinstance(x, Tensor):
        return False
    return torch.is_autocast_enabled("cpu" if x.is_cpu or x.is_meta else x.device.type)


def widest(*data: Any) -> tuple[Any, ...]:
    """Under autocast data of several dtypes meet in the widest of them, as in torch's own ops."""
    dtype = None
    for x in data:
        if isinstance(x, Tensor) and x.is_floating_point():
            dtype = x.dtype if dtype is None else torch.promote_types(dtype, x.dtype)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in data
    )


def side_dtype(side: Any, x: Any) -> Any:
    """Under autocast a side tensor that is neither float32 nor of x's dtype becomes that."""
    if isinstance(side, Tensor) and side.is_floating_point() and isinstance(x, Tensor):
        keeps = side.dtype in (x.dtype, torch.float32) and x.dtype != torch.float64
        return side if keeps else side.to(x.dtype)
    return side
