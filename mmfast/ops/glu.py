"""`glu` and `glu_packed`: gated linear units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mmfast import dispatch
from mmfast.ops import _checks, _fused, _rows
from mmfast.ops._autograd import composed_derivatives, in_eager, is_plain
from mmfast.reference.activations import GLU_ACTIVATIONS

__all__ = ["glu", "glu_packed"]

_CODES = {name: code for code, name in enumerate(GLU_ACTIVATIONS)}


def glu(a: Tensor, b: Tensor, activation: str = "silu") -> Tensor:
    """Gated linear unit, `out = act(a) * b`.

    One pass: reads a and b, writes out; computed in float32 (float64 for float64) and rounded once.
    The backward reads a, b and the gradient and writes both gradients; only a and b are kept for it
    (0 bytes beyond the inputs).

    Args:
        a: `[..., C]` gate branch; float32, bfloat16, float16 or float64 (CPU). Any strides: with
            the last dim dense nothing is copied.
        b: shape and dtype of a, multiplied by `act(a)`.
        activation: "silu" (SwiGLU), "gelu" (erf; GEGLU), "gelu_tanh", "relu" (ReGLU), "sigmoid"
            (the original GLU; `F.glu(x)` is `glu(second half, first half, "sigmoid")`) or
            "identity" (bilinear).

    Returns:
        `[..., C]`, dtype of a.

    Raises:
        TypeError: something is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices differ, or the activation is unknown.
        RuntimeError: the backend asked for by name cannot take this call; or a gradient of a
            gradient is taken on a backend other than the reference.

    Under autocast a and b meet in the wider of their dtypes.

    Source: Dauphin et al. 2017, Shazeer 2020.
    """
    kernels = _fused.quick("glu", a, b)
    if (
        kernels is not None
        and b is not None
        and a.dim() == 3
        and a.shape == b.shape
        and a.dtype == b.dtype
    ):
        return _fused.call(_GLU, kernels, True, (a, b), (_code("glu", activation),))
    if _rows.autocast_on(a):
        a, b = _rows.widest(a, b)
    eager = in_eager() and is_plain(a) and is_plain(b)
    if not eager or a.dtype not in _checks.FLOAT_DTYPES or a.dim() < 1:
        _rows.require_data("glu", "a", a)
    if not eager or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        _rows.require_like("glu", "b", b, "a", a)
    code = _code("glu", activation)
    row = dispatch.select("glu", a, composed_derivatives(eager, a, b))
    if row.composed:
        return row.launcher(a, b, activation)
    out = _fused.call(_GLU, row.launcher(), eager, (a, b), (code,))
    return out if a.dim() == 3 else out.view(a.shape)


def glu_packed(ab: Tensor, activation: str = "silu") -> Tensor:
    """`glu(a, b, activation)` of the two halves of one projection, `ab = [a | b]`.

    Args:
        ab: `[..., 2 C]`; the first half of the last dim goes through the activation. (`F.glu` has
            its halves the other way round.) float32, bfloat16, float16 or float64 (CPU).
        activation: as in `mmfast.glu`.

    Returns:
        `[..., C]`, dtype of ab. The backward writes one gradient `[..., 2 C]`, so that the
        projection before it needs no concatenation.

    Raises:
        TypeError, ValueError, RuntimeError: as `mmfast.glu`; ValueError for an odd last dim.
    """
    kernels = _fused.quick("glu_packed", ab)
    if kernels is not None and ab.dim() == 3 and ab.shape[2] % 2 == 0:
        return _fused.call(_PACKED, kernels, True, (ab,), (_code("glu_packed", activation),))
    eager = in_eager() and is_plain(ab)
    if not eager or ab.dtype not in _checks.FLOAT_DTYPES or ab.dim() < 1:
        _rows.require_data("glu_packed", "ab", ab)
    if ab.shape[-1] % 2 != 0:
        raise ValueError(
            f"glu_packed: ab has shape {_checks.shape_text(ab)}, its last dim must be even; "
            f"it holds two halves of one width"
        )
    code = _code("glu_packed", activation)
    row = dispatch.select("glu_packed", ab, composed_derivatives(eager, ab))
    if row.composed:
        return row.launcher(ab, activation)
    out = _fused.call(_PACKED, row.launcher(), eager, (ab,), (code,))
    return out if ab.dim() == 3 else out.view(*ab.shape[:-1], ab.shape[-1] // 2)


def _code(op: str, activation: Any) -> int:
    code = _CODES.get(activation) if isinstance(activation, str) else None
    if code is None:
        known = ", ".join(repr(name) for name in _CODES)
        raise ValueError(f"{op}: activation is {activation!r}; it must be one of {known}")
    return code


# --- kernels and gradients ---------------------------------------------------------------------


def _prepare(leaves: Any, rest: Any) -> tuple[Any, ...]:
    return (*map(_rows.to_rows, leaves), *rest)


def _keep(args: Any, result: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return args[:-1], args[-1:]


def _glu_gradients(
    bwd: Callable[..., Any], incoming: Any, saved: Any, numbers: Any, needs: Any
) -> tuple[Any, ...]:
    return tuple(bwd(_fused.dense_last(incoming[0]), *saved, *numbers))


def _packed_gradients(
    bwd: Callable[..., Any], incoming: Any, saved: Any, numbers: Any, needs: Any
) -> tuple[Any, ...]:
    return (bwd(_fused.dense_last(incoming[0]), *saved, *numbers),)


def _glu_fwd_fake(a: Tensor, b: Tensor, activation: int) -> Tensor:
    return _fused.empty_like_rows(a)


def _glu_bwd_fake(dout: Tensor, a: Tensor, b: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    return _fused.empty_like_rows(a), _fused.empty_like_rows(b)


def _packed_fwd_fake(ab: Tensor, activation: int) -> Tensor:
    return _fused.empty_like_rows(ab, ab.shape[2] // 2)


def _packed_bwd_fake(dout: Tensor, ab: Tensor, activation: int) -> Tensor:
    return _fused.empty_like_rows(ab)


_GLU = _fused.Fused("glu", _prepare, _keep, _glu_gradients, (0, 1), _glu_fwd_fake, _glu_bwd_fake)
_PACKED = _fused.Fused(
    "glu_packed", _prepare, _keep, _packed_gradients, (0,), _packed_fwd_fake, _packed_bwd_fake
)
_fused.register(_GLU)
_fused.register(_PACKED)
