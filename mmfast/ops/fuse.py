"""`fuse`: several modalities become one, by gates over those that are present."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast import dispatch
from mmfast.ops import _checks, _fused, _rows
from mmfast.ops._autograd import composed_derivatives, in_eager, is_plain
from mmfast.reference.fuse import is_pair, spread_logits

__all__ = ["fuse"]

_OP = "fuse"
_MODES = {"softmax": 0, "sigmoid": 1, "gmu": 2}
_PAIR = 3


def fuse(
    features: Sequence[Tensor],
    logits: Tensor,
    *,
    mode: str,
    present: Tensor | None = None,
) -> Tensor:
    """The gated sum of K features, one a modality, over those that are present::

        "softmax"  out = sum_k w_k x_k,  w = softmax of the logits over the modalities present
        "sigmoid"  out = sum_k sigmoid(l_k) x_k
        "gmu"      out = sum_k sigmoid(l_k) tanh(x_k), or for K = 2 with one logit
                   out = z tanh(x_1) + (1 - z) tanh(x_2),  z = sigmoid(l)

    A modality that is absent is left out: it may hold NaN, contributes exactly nothing and gets
    exactly zero gradients. Where none is present out is exactly 0. One pass: reads the features,
    writes out; computed in float32 (float64 for float64) and rounded once. The backward reads the
    features and the gradient and writes all gradients in one pass; weights and tanh are recomputed
    (0 bytes kept beyond the inputs).

    Args:
        features: K >= 1 tensors `[B, ..., C]` of one shape and dtype: float32, bfloat16, float16
            or float64 (CPU). Any strides: with the last dim dense nothing is copied.
        logits: dtype of the features or float32: `[K]`, `[B, K]`, `[B, ..., K]` or
            `[B, ..., K, C]`; any dim before K, and C, may be 1. In the mode "gmu" with K = 2 also
            one logit for both, `[B, ..., C]` or `[B, ..., 1]` (of the features' rank; where C = 2
            this reading counts, give `[B, ..., 2, 1]` for a logit each). Has a gradient.
        mode: "softmax", "sigmoid" or "gmu".
        present: bool `[B, K]`, True = the item has the modality. Default: all.

    Returns:
        `[B, ..., C]`, dtype of the features.

    In the mode "softmax" a logit of -inf has weight 0, and where all present ones are -inf out is
    exactly 0; a logit of +inf takes all the weight, several share it, with gradient 0.

    Raises:
        TypeError: something is not a tensor, or has the wrong dtype.
        ValueError: a shape or device is wrong, there is no feature, or the mode is unknown.
        RuntimeError: the backend asked for by name cannot take this call; or a gradient of a
            gradient is taken on a backend other than the reference.

    Under autocast the features meet in the widest of their dtypes.

    Source: Arevalo et al. 2017 (gated multimodal units); softmax mixing as in ELMo (Peters et al.
    2018).
    """
    if not isinstance(features, list | tuple) or len(features) == 0:
        raise _no_features(features)
    features = list(features)
    x, K = features[0], len(features)
    kernels = _fused.quick(_OP, *features, logits, present)
    if kernels is not None and _is_simple(features, logits, mode, present):
        rest: tuple[Any, ...] = (present, _MODES[mode], mode)
        return _fused.call(_SPEC, kernels, True, (*features, logits), rest)
    if _rows.autocast_on(x):
        features = list(_rows.widest(*features))
        x = features[0]
        logits = _rows.side_dtype(logits, x)
    eager = in_eager() and is_plain(logits)
    eager = eager and (present is None or is_plain(present))
    for feature in features:
        eager = eager and is_plain(feature)
    if not eager or x.dtype not in _checks.FLOAT_DTYPES:
        _rows.require_data(_OP, "features[0]", x)
    if x.dim() < 2:
        raise ValueError(
            f"{_OP}: features[0] has shape {_checks.shape_text(x)}, expected [B, ..., C]; "
            f"unsqueeze a dim of items"
        )
    for index in range(1, K):
        other = features[index]
        if not eager or other.shape != x.shape or other.dtype != x.dtype:
            _rows.require_like(_OP, f"features[{index}]", other, "features[0]", x)
    if not isinstance(mode, str) or mode not in _MODES:
        raise ValueError(f"{_OP}: mode is {mode!r}; it must be 'softmax', 'sigmoid' or 'gmu'")
    _rows.require_side(_OP, "logits", logits, "features[0]", x)
    _require_logits(logits, x, K, mode)
    if present is not None:
        _require_present(present, x, K)

    row = dispatch.select(_OP, x, composed_derivatives(eager, *features, logits), K)
    if row.composed:
        return row.launcher(features, logits, mode=mode, present=present)
    rank = x.dim()
    if present is not None:
        present = present.contiguous()
    leaves = (*features, logits)
    if rank > 3 or not eager:  # views and sums over expanded dims are for torch to differentiate
        pair, spread = spread_logits(logits, x, K, mode)
        rows = _logits_to_rows(spread, x.shape[1:-1])
        leaves = (*map(_rows.to_rows, features), rows)
        rest = (present, _PAIR if pair else _MODES[mode], None)
    else:
        rest = (present, _MODES[mode], mode)
    out = _fused.call(_SPEC, row.launcher(), eager, leaves, rest)
    return out if rank == 3 else out.view(x.shape)


def _logits_to_rows(logits: Tensor, middle: tuple[int, ...]) -> Tensor:
    """`[B or 1, ..., K, C or 1]` -> `[B or 1, N or 1, K, C or 1]`, channels dense."""
    K, C = logits.shape[-2], logits.shape[-1]
    if logits.dim() == 3:
        logits = logits.unsqueeze(1)
    elif logits.dim() > 4:
        between = logits.shape[1:-2]
        if between != middle and any(size != 1 for size in between):
            logits = logits.expand(logits.shape[0], *middle, K, C)
        logits = logits.flatten(1, -3)
    return logits if C == 1 or logits.stride(3) == 1 else logits.contiguous()


def _is_simple(features: list[Tensor], logits: Tensor, mode: Any, present: Any) -> bool:
    """`[B, N, C]` with logits of its dtype for each row or channel: nothing is left to check."""
    x, K = features[0], len(features)
    shape, dtype = x.shape, x.dtype
    if len(shape) != 3 or K > dispatch.MAX_MODALITIES or mode not in ("softmax", "sigmoid", "gmu"):
        return False
    for other in features:
        if other is None or other.shape != shape or other.dtype != dtype:
            return False
    if logits is None or logits.dtype != dtype or logits.dim() != 3 or shape[2] == K:
        return False
    one_for_both = mode == "gmu" and K == 2 and logits.shape == shape
    if logits.shape[:2] != shape[:2] or not (one_for_both or logits.shape[2] == K):
        return False
    return present is None or (present.dtype == torch.bool and present.shape == (shape[0], K))


# --- arguments ---------------------------------------------------------------------------------


def _no_features(features: Any) -> Exception:
    if isinstance(features, list | tuple):
        return ValueError(f"{_OP}: features is empty; give at least one tensor [B, ..., C]")
    return TypeError(
        f"{_OP}: features must be a list or tuple of tensors, got {type(features).__name__}; "
        f"unbind a stacked tensor with .unbind(dim)"
    )


def _require_logits(logits: Tensor, x: Tensor, K: int, mode: str) -> None:
    shape, rank = logits.shape, x.dim()
    lead = x.shape[:-1]

    def broadcasts(sizes: Sequence[int]) -> bool:
        return all(got == want or got == 1 for got, want in zip(sizes, lead, strict=True))

    if len(shape) == 1:
        good = shape[0] == K
    elif len(shape) == 2 and rank > 2:
        good = shape[1] == K and (shape[0] == x.shape[0] or shape[0] == 1)
    elif len(shape) == rank:
        one_for_both = mode == "gmu" and K == 2 and is_pair(logits, x)
        good = broadcasts(shape[:-1]) and (shape[-1] == K or one_for_both)
    elif len(shape) == rank + 1:
        good = broadcasts(shape[:-2]) and shape[-2] == K and shape[-1] in (1, x.shape[-1])
    else:
        good = False
    if not good:
        also = ", or [B, ..., C] or [B, ..., 1] for both" if mode == "gmu" and K == 2 else ""
        raise ValueError(
            f"{_OP}: logits has shape {_checks.shape_text(logits)} but there are K={K} features of "
            f"shape {_checks.shape_text(x)}; give [K], [B, K], [B, ..., K] or [B, ..., K, C]{also}"
        )


def _require_present(present: Any, x: Tensor, K: int) -> None:
    _checks.require_tensor(_OP, "present", present)
    if present.dtype != torch.bool:
        raise TypeError(
            f"{_OP}: present must be bool (True = the item has the modality), got "
            f"{present.dtype}; convert it with .bool()"
        )
    if present.device != x.device:
        raise ValueError(
            f"{_OP}: present is on {present.device} but features[0] is on {x.device}; "
            f"move all tensors to one device"
        )
    if present.dim() != 2 or present.shape[0] != x.shape[0] or present.shape[1] != K:
        raise ValueError(
            f"{_OP}: present has shape {_checks.shape_text(present)}, expected [B, K] = "
            f"[{x.shape[0]}, {K}]; it holds one bool for each item and modality"
        )


# --- kernels and gradients ---------------------------------------------------------------------


def _prepare(leaves: Any, rest: Any) -> tuple[Any, ...]:
    """`rest` holds the mode's name where the logits are still in their public form."""
    *features, logits = leaves
    present, code, mode = rest
    if mode is not None:
        x = features[0]
        pair, spread = spread_logits(logits, x, len(features), mode)
        logits = _logits_to_rows(spread, x.shape[1:-1])
        code = _PAIR if pair else code
    return [_rows.to_rows(feature) for feature in features], logits, present, code


def _keep(args: Any, result: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    features, logits, present, code = args
    return (*features, logits, present), (code,)


def _gradients(
    bwd: Callable[..., Any], incoming: Any, saved: Any, numbers: Any, needs: Any
) -> tuple[Any, ...]:
    *features, logits, present = saved
    needs_features, needs_logits = any(needs[:-1]), needs[-1]
    dfeatures, dlogits = bwd(
        _fused.dense_last(incoming[0]), features, logits, present, *numbers, needs_features,
        needs_logits,
    )  # fmt: skip
    return (
        *(dfeatures if needs_features else (None,) * len(features)),
        dlogits if needs_logits else None,
    )


def _fwd_fake(features: list[Tensor], logits: Tensor, present: Tensor | None, mode: int) -> Tensor:
    return _fused.empty_like_rows(features[0])


def _bwd_fake(
    dout: Tensor,
    features: list[Tensor],
    logits: Tensor,
    present: Tensor | None,
    mode: int,
    need_dfeatures: bool,
    need_dlogits: bool,
) -> tuple[list[Tensor], Tensor]:
    made = [_fused.empty_like_rows(feature) for feature in features] if need_dfeatures else []
    return made, _fused.empty_side(logits, need_dlogits, dout)


_SPEC = _fused.Fused(_OP, _prepare, _keep, _gradients, (0, 1), _fwd_fake, _bwd_fake)
_fused.register(_SPEC)
