"""`modulate`: normalise, scale and shift by a condition; with a gated residual before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mmfast import dispatch
from mmfast.ops import _checks, _fused, _rows
from mmfast.ops._autograd import composed_derivatives, in_eager, is_plain
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
    kernels = _fused.quick(_OP, x, residual, gate, scale, shift, weight, bias)
    if kernels is not None and _is_simple(x, residual, gate, scale, shift, weight, bias, norm, eps):
        leaves: tuple[Any, ...] = (x, residual, gate, scale, shift, weight, bias)
        out, h = _fused.call(_SPEC, kernels, True, leaves, (_NORMS[norm], float(eps)))
        return out if residual is None else ModulateOutput(out, h)
    if _rows.autocast_on(x):
        x, residual = _rows.widest(x, residual)
        scale, shift, gate, weight, bias = (
            _rows.side_dtype(side, x) for side in (scale, shift, gate, weight, bias)
        )
    eager = in_eager() and is_plain(x)
    for tensor in (residual, gate, scale, shift, weight, bias):
        if tensor is not None and eager:
            eager = is_plain(tensor)
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
    rank = x.dim()
    leaves = (x, residual, gate, scale, shift, weight, bias)
    if rank > 3:  # views and sums over expanded dims are for torch to differentiate
        leaves = _prepare(leaves, ())
    out, h = _fused.call(_SPEC, row.launcher(), eager, leaves, (_NORMS[norm], float(eps)))
    if rank != 3:
        out = out.view(x.shape)
        h = h if residual is None else h.view(x.shape)
    return out if residual is None else ModulateOutput(out, h)


def _is_simple(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Any,
    eps: float,
) -> bool:
    """`[B, N, C]` with `[B, C]` beside it, all of one dtype: nothing is left to check."""
    shape, dtype = x.shape, x.dtype
    if len(shape) != 3 or norm not in ("layer", "rms", None) or not 0.0 < eps < math.inf:
        return False
    if residual is None:
        if gate is not None:
            return False
    elif residual.shape != shape or residual.dtype != dtype:
        return False
    B, _, C = shape
    for side in (gate, scale, shift):
        if side is not None and (side.shape != (B, C) or side.dtype != dtype):
            return False
    for side in (weight, bias):
        if side is not None and (side.shape != (C,) or side.dtype != dtype):
            return False
    return True


def _require_modulation(name: str, side: Any, x: Tensor) -> None:
    _rows.require_side(_OP, name, side, "x", x)
    if not _rows.lines_up(side, x, channels=x.shape[-1]):
        raise ValueError(
            f"{_OP}: {name} has shape {_checks.shape_text(side)} but x has "
            f"{_checks.shape_text(x)}; give [C], [B, C], or x's rank with each dim before C that "
            f"of x or 1"
        )


# --- kernels and gradients ---------------------------------------------------------------------


def _prepare(leaves: Any, rest: Any) -> tuple[Any, ...]:
    x, residual, gate, scale, shift, weight, bias = leaves
    rank, middle = x.dim(), x.shape[1:-1]
    return (
        _rows.to_rows(x), None if residual is None else _rows.to_rows(residual),
        _side(gate, rank, middle), _side(scale, rank, middle), _side(shift, rank, middle),
        weight, bias, *rest,
    )  # fmt: skip


def _side(side: Tensor | None, rank: int, middle: Any) -> Tensor | None:
    if side is None:
        return None
    side = _rows.side_to_rows(side, rank, middle)
    return side if side.stride(2) == 1 or side.shape[2] == 1 else side.contiguous()


def _keep(args: Any, result: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (args[0], *args[2:7], result[1]), args[7:]


def _gradients(
    bwd: Callable[..., Any], incoming: Any, saved: Any, numbers: Any, needs: Any
) -> tuple[Any, ...]:
    x, gate, scale, shift, weight, bias, h = saved
    dout, dh = incoming
    if dout is not None:
        dout = _fused.dense_last(dout)
    if h.dim() == 1:  # there was no residual
        h = dh = None
    elif dh is not None:
        dh = _fused.dense_last(dh)
    if dout is None and dh is None:
        return (None,) * 7
    grads = bwd(dout, dh, x, h, gate, scale, weight, bias, *numbers, shift, list(needs))
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


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


_SPEC = _fused.Fused(_OP, _prepare, _keep, _gradients, tuple(range(7)), _fwd_fake, _bwd_fake)
_fused.register(_SPEC)
