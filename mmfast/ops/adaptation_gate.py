"""`adaptation_gate`: other modalities move a token, at most so far as it is long."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfast import dispatch
from mmfast.ops import _checks, _fused, _rows
from mmfast.ops._autograd import composed_derivatives, in_eager, is_plain

__all__ = ["adaptation_gate"]

_OP = "adaptation_gate"


def adaptation_gate(
    z: Tensor,
    h: Tensor,
    *,
    beta: float = 1.0,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> Tensor:
    """The gate of MAG: a displacement scaled to the token that it moves, then LayerNorm::

        alpha = min(beta * |z| / |h|, 1)        in each row; 1 where |h| = 0
        out   = LayerNorm(z + alpha * h) * weight + bias

    One pass: reads z and h, writes out; computed in float32 (float64 for float64) and rounded once.
    The backward reads z, h and the gradient and writes all gradients in one pass; norms and
    statistics are recomputed (0 bytes kept beyond the inputs).

    Args:
        z: `[..., C]` tokens, usually text `[B, N, C]`; float32, bfloat16, float16 or float64 (CPU).
        h: displacement by the other modalities, shape and dtype of z.
        beta: how long, against the token, the displacement may be; finite, >= 0.
        eps: of the LayerNorm, > 0.
        weight, bias: `[C]` of the LayerNorm, dtype of z or float32; either may be None.
        row_mask: bool `[...]` over the rows of z (any dim may be 1). Where it is False there is no
            displacement: out is LayerNorm(z), h may hold NaN, and its gradient is 0.

    Returns:
        Shape and dtype of z.

    The gradient flows through alpha where it is below 1; |z| has gradient 0 at z = 0.

    Raises:
        TypeError: something is not a tensor, or has the wrong dtype.
        ValueError: a shape, device or number is wrong.
        RuntimeError: the backend asked for by name cannot take this call; or a gradient of a
            gradient is taken on a backend other than the reference.

    Under autocast z and h meet in the wider of their dtypes.

    Source: Rahman et al. 2020 (Integrating Multimodal Information in Large Pretrained
    Transformers). There a small epsilon is added to |h|; here |h| = 0 is a case of its own.
    """
    kernels = _fused.quick(_OP, z, h, weight, bias, row_mask)
    if (
        kernels is not None
        and h is not None
        and z.dim() == 3
        and z.shape == h.shape
        and z.dtype == h.dtype
        and (weight is None or (weight.shape == z.shape[2:] and weight.dtype == z.dtype))
        and (bias is None or (bias.shape == z.shape[2:] and bias.dtype == z.dtype))
        and (row_mask is None or (row_mask.shape == z.shape[:2] and row_mask.dtype == torch.bool))
        and 0.0 <= beta < math.inf
        and 0.0 < eps < math.inf
    ):
        rest = (row_mask, float(beta), float(eps))
        return _fused.call(_SPEC, kernels, True, (z, h, weight, bias), rest)
    if _rows.autocast_on(z):
        z, h = _rows.widest(z, h)
        weight, bias = _rows.side_dtype(weight, z), _rows.side_dtype(bias, z)
    sides = (weight, bias, row_mask)
    eager = in_eager() and is_plain(z) and is_plain(h)
    eager = eager and all(side is None or is_plain(side) for side in sides)
    if not eager or z.dtype not in _checks.FLOAT_DTYPES or z.dim() < 1:
        _rows.require_data(_OP, "z", z)
    if not eager or z.shape != h.shape or z.dtype != h.dtype or z.device != h.device:
        _rows.require_like(_OP, "h", h, "z", z)
    for name, side in (("weight", weight), ("bias", bias)):
        if side is not None:
            _rows.require_channels(_OP, name, side, "z", z)
    if row_mask is not None:
        _rows.require_row_mask(_OP, row_mask, "z", z)
    if not 0.0 <= beta < math.inf:
        raise ValueError(f"{_OP}: beta is {beta}; it must be finite and at least 0")
    if not 0.0 < eps < math.inf:
        raise ValueError(f"{_OP}: eps is {eps}; it must be finite and above 0")

    row = dispatch.select(_OP, z, composed_derivatives(eager, z, h, weight, bias))
    if row.composed:
        return row.launcher(z, h, beta=beta, eps=eps, weight=weight, bias=bias, row_mask=row_mask)
    leaves: tuple[Any, ...] = (z, h, weight, bias)
    rank = z.dim()
    if row_mask is not None:
        row_mask = _rows.mask_to_rows(row_mask, rank, z.shape[1:-1])
    if rank > 3:
        leaves = (*map(_rows.to_rows, leaves[:2]), weight, bias)
    rest = (row_mask, float(beta), float(eps))
    out = _fused.call(_SPEC, row.launcher(), eager, leaves, rest)
    return out if rank == 3 else out.view(z.shape)


def _prepare(leaves: Any, rest: Any) -> tuple[Any, ...]:
    z, h, weight, bias = leaves
    return _rows.to_rows(z), _rows.to_rows(h), _contiguous(weight), _contiguous(bias), *rest


def _contiguous(side: Tensor | None) -> Tensor | None:
    return None if side is None else side.contiguous()


def _keep(args: Any, result: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return args[:5], args[5:]


def _gradients(
    bwd: Callable[..., Any], incoming: Any, saved: Any, numbers: Any, needs: Any
) -> tuple[Any, ...]:
    grads = bwd(_fused.dense_last(incoming[0]), *saved, *numbers, list(needs))
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _fwd_fake(
    z: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_mask: Tensor | None,
    beta: float,
    eps: float,
) -> Tensor:
    return _fused.empty_like_rows(z)


def _bwd_fake(
    dout: Tensor,
    z: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_mask: Tensor | None,
    beta: float,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def rows(x: Tensor, needed: bool) -> Tensor:
        return _fused.empty_like_rows(x) if needed else x.new_empty((0,))

    return (
        rows(z, needs[0]),
        rows(h, needs[1]),
        _fused.empty_side(weight, needs[2], z),
        _fused.empty_side(bias, needs[3], z),
    )


_SPEC = _fused.Fused(_OP, _prepare, _keep, _gradients, (0, 1, 2, 3), _fwd_fake, _bwd_fake)
_fused.register(_SPEC)
