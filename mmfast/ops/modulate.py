"""`modulate`: normalise, scale and shift by a condition; with a gated residual before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mmfast import dispatch
from mmfast.ops import _checks, _fused, _rows
from mmfast.ops._autograd import composed_derivatives, in_eager
from mmfast.reference import ModulateOutput

__all__ = ["ModulateOutput", "modulate"]

_OP = "modulate"
_NORMS = {None: 0, "layer": 1, "rms": 2}


def modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: str | None = "layer",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Any:
    """Normalises a stream and modulates it by a condition, the residual before it included::

        h   = x                         without a residual
        h   = residual + gate * x       with one (a gate that is absent counts as 1)
        u   = norm(h) * weight + bias
        out = u * (1 + scale) + shift

    What is absent is left out. `norm=None` is FiLM. One pass: reads x (and residual), writes out
    (and h); computed in float32 (float64 for float64). h is rounded to the storage dtype before it
    is normalised, as the stream that the next layer reads is. The backward reads x, h and the
    gradients once and writes all gradients in one pass; statistics are recomputed (0 bytes kept
    beyond the inputs and h, which is a result).

    Args:
        x: `[..., C]`, usually `[B, N, C]`: the stream, or with a residual the branch that joins it;
            float32, bfloat16, float16 or float64 (CPU).
        scale, shift: dtype of x or float32: `[C]`, `[B, C]` (one row for each item; a slice of a
            wider projection is taken as it is), or of x's rank with every dim but the last that of
            x or 1.
        norm: "layer" (mean and variance over C), "rms" (`h * rsqrt(mean(h^2) + eps)`) or None.
        residual: shape and dtype of x.
        gate: as scale; needs a residual.
        weight, bias: `[C]` of the norm, dtype of x or float32.
        eps: of the norm, > 0.

    Returns:
        `out`, shape and dtype of x; with a residual `ModulateOutput(out, h)`.

    Raises:
        TypeError: something is not a tensor, or has the wrong dtype.
        ValueError: a shape, device, name or number is wrong; a gate comes without a residual.
        RuntimeError: the backend asked for by name cannot take this call; or a gradient of a
            gradient is taken on a backend other than the reference.

    Under autocast x and residual meet in the wider of their dtypes.

    Source: Perez et al. 2018 (FiLM); Peebles and Xie 2023 (DiT: adaLN, adaLN-zero).
    """
    if _rows.autocast_on(x):
        x, residual = _rows.widest(x, residual)
        scale, shift, gate, weight, bias = (
            _rows.side_dtype(side, x) for side in (scale, shift, gate, weight, bias)
        )
    eager = in_eager() and _fused.is_plain(x)
    for tensor in (residual, gate, scale, shift, weight, bias):
        if tensor is not None and eager:
            eager = _fused.is_plain(tensor)
    if not eager or x.dtype not in _checks.FLOAT_DTYPES or x.dim() < 1:
        _rows.require_data(_OP, "x", x)
    if residual is not None:
        _rows.require_like(_OP, "residual", residual, "x", x)
    elif gate is not None:
        raise ValueError(
            f"{_OP}: gate comes without a residual; give the stream that gate * x is added to as "
            f"residual, or leave the gate out"
        )
    if weight is not None:
        _rows.require_channels(_OP, "weight", weight, "x", x)
        weight = weight.contiguous()
    if bias is not None:
        _rows.require_channels(_OP, "bias", bias, "x", x)
        bias = bias.contiguous()
    if not isinstance(norm, str | None) or norm not in _NORMS:
        raise ValueError(f"{_OP}: norm is {norm!r}; it must be 'layer', 'rms' or None")
    if not 0.0 < eps < math.inf:
        raise ValueError(f"{_OP}: eps is {eps}; it must be finite and above 0")
    for name, side in (("scale", scale), ("shift", shift), ("gate", gate)):
        if side is not None:
            _require_modulation(name, side, x)

    derivatives = composed_derivatives(eager, x, residual, gate, scale, shift, weight, bias)
    row = dispatch.select(_OP, x, derivatives)
    if row.composed:
        return row.launcher(
            x, scale, shift, norm=norm, residual=residual, gate=gate, weight=weight, bias=bias,
            eps=eps,
        )  # fmt: skip
    shape = x.shape
    args = (
        _rows.to_rows(x), None if residual is None else _rows.to_rows(residual),
        _side(gate, x), _side(scale, x), _side(shift, x), weight, bias, _NORMS[norm], float(eps),
    )  # fmt: skip
    out, h = _fused.call(_SPEC, row, eager, args)
    if len(shape) != 3:
        out = out.view(shape)
        h = h if residual is None else h.view(shape)
    return out if residual is None else ModulateOutput(out, h)


def _side(side: Tensor | None, x: Tensor) -> Tensor | None:
    if side is None:
        return None
    side = _rows.side_to_rows(side, x.dim(), x.shape[1:-1])
    return side if side.stride(2) == 1 or side.shape[2] == 1 else side.contiguous()


def _require_modulation(name: str, side: Any, x: Tensor) -> None:
    _rows.require_side(_OP, name, side, "x", x)
    if not _rows.lines_up(side, x, channels=x.shape[-1]):
        raise ValueError(
            f"{_OP}: {name} has shape {_checks.shape_text(side)} but x has "
            f"{_checks.shape_text(x)}; give [C], [B, C], or x's rank with each dim before C that "
            f"of x or 1"
        )


# --- gradients ---------------------------------------------------------------------------------

# Positions in the forward's arguments.
_X, _RESIDUAL, _GATE, _SCALE, _SHIFT, _WEIGHT, _BIAS, _NORM, _EPS = range(9)


def _gradients(
    bwd: Callable[..., Any], incoming: Any, saved: Any, rest: Any, needs: Any
) -> tuple[Any, ...]:
    x, gate, scale, shift, weight, bias, h = saved
    dout, dh = (None if grad is None else _fused.dense_last(grad) for grad in incoming)
    if h.dim() == 1:  # there was no residual
        h = dh = None
    if dout is None and dh is None:
        return (None,) * 7
    dx, dresidual, dgate, dscale, dshift, dweight, dbias = bwd(
        dout, dh, x, h, gate, scale, weight, bias, *rest, shift, needs
    )
    found = (dx, dresidual, dgate, dscale, dshift, dweight, dbias)
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


def _fwd_fake(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    h = x.new_empty((0,)) if residual is None else _fused.empty_like_rows(x)
    return _fused.empty_like_rows(x), h


def _bwd_fake(
    dout: Tensor | None,
    dh: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: int,
    eps: float,
    shift: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    def rows(like: Tensor, needed: bool) -> Tensor:
        return _fused.empty_like_rows(like) if needed else like.new_empty((0,))

    sides = ((gate, 2), (scale, 3), (shift, 4), (weight, 5), (bias, 6))
    return (
        rows(x, needs[0]),
        rows(x if h is None else h, needs[1] and h is not None),
        *(_fused.empty_side(side, needs[position], x) for side, position in sides),
    )


_LEAVES = (_X, _RESIDUAL, _GATE, _SCALE, _SHIFT, _WEIGHT, _BIAS)
_SAVED = (_X, _GATE, _SCALE, _SHIFT, _WEIGHT, _BIAS)
_SPEC = _fused.Fused(
    _OP, _LEAVES, _SAVED, (_NORM, _EPS), _gradients, _fwd_fake, _bwd_fake, keeps_result=1
)
_fused.register(_SPEC)
