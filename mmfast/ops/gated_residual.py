"""`gated_residual`: a branch joins a stream through a gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfast import dispatch
from mmfast.ops import _checks, _fused, _rows
from mmfast.ops._autograd import composed_derivatives, in_eager, is_plain
from mmfast.reference.activations import GATE_ACTIVATIONS

__all__ = ["gated_residual"]

_OP = "gated_residual"
_CODES = {name: code for code, name in enumerate(GATE_ACTIVATIONS)}


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    activation: str = "tanh",
    row_mask: Tensor | None = None,
) -> Tensor:
    """Adds a gated branch to a stream, `out = x + row_mask * act(gate) * y`.

    One pass: reads x and y, writes out; computed in float32 (float64 for float64) and rounded once.
    The backward reads y and the gradient and writes dy and dgate in one pass (dx is the gradient
    itself); y, gate and row_mask are kept for it (0 bytes beyond the inputs; x is not kept).

    Args:
        x: `[..., C]` stream, usually `[B, N, C]`; float32, bfloat16, float16 or float64 (CPU). Any
            strides: with the last dim dense nothing is copied.
        y: branch, shape and dtype of x.
        gate: logits, dtype of x or float32: `[1]` (one for all), `[C]`, `[B, C]` (one row for each
            item), or of x's rank with every dim that of x or 1. Has a gradient.
        activation: "tanh" (Flamingo: a gate of 0 is the identity), "sigmoid" or "identity" (DiT's
            adaLN-zero).
        row_mask: bool `[...]` over the rows of x (any dim may be 1), True = the row takes part.
            Where it is False, out is x exactly; y may hold NaN there, and its gradient is 0.

    Returns:
        Shape and dtype of x.

    Raises:
        TypeError: something is not a tensor, or has the wrong dtype.
        ValueError: a shape or device is wrong, or the activation is unknown.
        RuntimeError: the backend asked for by name cannot take this call; or a gradient of a
            gradient is taken on a backend other than the reference.

    Under autocast x and y meet in the wider of their dtypes.

    Source: Alayrac et al. 2022 (Flamingo); Peebles and Xie 2023 (DiT).
    """
    kernels = _fused.quick(_OP, x, y, gate, row_mask)
    if (
        kernels is not None
        and y is not None
        and gate is not None
        and x.dim() == 3
        and x.shape == y.shape
        and x.dtype == y.dtype == gate.dtype
        and gate.dim() == 1
        and gate.shape[0] in (1, x.shape[2])
        and (row_mask is None or (row_mask.shape == x.shape[:2] and row_mask.dtype == torch.bool))
    ):
        return _fused.call(_SPEC, kernels, True, (x, y, gate), (row_mask, _code(activation)))
    if _rows.autocast_on(x):
        x, y = _rows.widest(x, y)
        gate = _rows.side_dtype(gate, x)
    eager = (
        in_eager()
        and is_plain(x)
        and is_plain(y)
        and is_plain(gate)
        and (row_mask is None or is_plain(row_mask))
    )
    if not eager or x.dtype not in _checks.FLOAT_DTYPES or x.dim() < 1:
        _rows.require_data(_OP, "x", x)
    if not eager or x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        _rows.require_like(_OP, "y", y, "x", x)
    _rows.require_side(_OP, "gate", gate, "x", x)
    if not _rows.lines_up(gate, x, channels=1):
        raise ValueError(
            f"{_OP}: gate has shape {_checks.shape_text(gate)} but x has "
            f"{_checks.shape_text(x)}; give [1], [C], [B, C], or x's rank with each dim that of x "
            f"or 1"
        )
    if row_mask is not None:
        _rows.require_row_mask(_OP, row_mask, "x", x)
    code = _code(activation)

    row = dispatch.select(_OP, x, composed_derivatives(eager, x, y, gate))
    if row.composed:
        return row.launcher(x, y, gate, activation=activation, row_mask=row_mask)
    leaves: tuple[Any, ...] = (x, y, gate)
    rank = x.dim()
    if row_mask is not None:
        row_mask = _rows.mask_to_rows(row_mask, rank, x.shape[1:-1])
    if rank > 3:  # views and sums over expanded dims are for torch to differentiate
        leaves = (*map(_rows.to_rows, leaves[:2]), _rows.side_to_rows(gate, rank, x.shape[1:-1]))
    out = _fused.call(_SPEC, row.launcher(), eager, leaves, (row_mask, code))
    return out if rank == 3 else out.view(x.shape)


def _code(activation: Any) -> int:
    code = _CODES.get(activation) if isinstance(activation, str) else None
    if code is None:
        known = ", ".join(repr(name) for name in _CODES)
        raise ValueError(f"{_OP}: activation is {activation!r}; it must be one of {known}")
    return code


# --- kernels and gradients ---------------------------------------------------------------------


def _prepare(leaves: Any, rest: Any) -> tuple[Any, ...]:
    x, y, gate = leaves
    return _rows.to_rows(x), _rows.to_rows(y), _rows.side_to_rows(gate, x.dim(), ()), *rest


def _keep(args: Any, result: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return args[1:4], args[4:]


def _gradients(
    bwd: Callable[..., Any], incoming: Any, saved: Any, numbers: Any, needs: Any
) -> tuple[Any, ...]:
    dout = incoming[0]
    _, needs_dy, needs_dgate = needs
    if not needs_dy and not needs_dgate:
        return dout, None, None
    dy, dgate = bwd(_fused.dense_last(dout), *saved, *numbers, needs_dy, needs_dgate)
    return dout, dy if needs_dy else None, dgate if needs_dgate else None


def _fwd_fake(
    x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None, activation: int
) -> Tensor:
    return _fused.empty_like_rows(x)


def _bwd_fake(
    dout: Tensor,
    y: Tensor,
    gate: Tensor,
    row_mask: Tensor | None,
    activation: int,
    need_dy: bool,
    need_dgate: bool,
) -> tuple[Tensor, Tensor]:
    dy = _fused.empty_like_rows(y) if need_dy else y.new_empty((0,))
    return dy, _fused.empty_side(gate, need_dgate, y)


_SPEC = _fused.Fused(_OP, _prepare, _keep, _gradients, (0, 1, 2), _fwd_fake, _bwd_fake)
_fused.register(_SPEC)
