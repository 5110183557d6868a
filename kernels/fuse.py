"""Gated sum of K modalities, forward: softmax, sigmoid and GMU. The backward is fuse_bwd.py.

Each feature is read once, absent ones not at all, and the result is written once; what the logits
add is small where they have no channels. The weights of a tile's K modalities stay in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from mmfast.kernels import _tuning
from mmfast.kernels._blocks import (
    first_tile,
    load_flags,
    load_rows,
    load_side,
    sigmoid,
    store_rows,
    stride_pair,
    tanh,
)
from mmfast.kernels._launch import (
    Layout,
    ceil_div,
    empty_like_rows,
    launch,
    layout,
    row_strides,
    unspecialised,
)
from torch import Tensor

MAX_FEATURES = 64  # the kernels are unrolled over them

INTEGERS = [
    *(f"{name}_{dim}" for name in ("out", "dout", "present") for dim in "bn"),
    *(f"{name}_{dim}" for name in ("logit", "dlogit") for dim in "bnk"),
    "N", "C", "tiles_n", "tiles_c", "chunk",
]  # fmt: skip


@triton.jit
def load_present(present_ptr, strides, b, n, N, K: tl.constexpr):
    """Which of K modalities each row has, K times `[BLOCK_N, 1]`; () where all are there."""
    flags = ()
    if present_ptr is not None:
        for k in tl.static_range(K):
            flags = flags + (load_flags(present_ptr + k, strides, b, n, N),)  # noqa: RUF005
    return flags


@triton.jit
def softmax_weights(
    logits_ptr, strides, stride_k, there, b, n, c, N, columns,
    K: tl.constexpr, VEC: tl.constexpr, LOGIT_N: tl.constexpr, LOGIT_C: tl.constexpr,
):  # fmt: skip
    """K weights, and the largest logit.

    A logit of -inf has weight 0, and nothing has weight where all are; +inf takes all the weight,
    several share it; NaN of a modality that is there makes all weights NaN.
    """
    UNIT: tl.constexpr = VEC if LOGIT_C else 1
    logits = ()
    most = tl.full([1, 1], float("-inf"), tl.float32)
    for k in tl.static_range(K):
        at = logits_ptr + k * stride_k.to(tl.int64) * UNIT
        logit = load_side(at, strides, b, n, c, N, columns, VEC, LOGIT_N, LOGIT_C)
        if len(there) > 0:
            logit = tl.where(there[k], logit, float("-inf"))
        logits = logits + (logit,)  # noqa: RUF005  Triton adds tuples, and does not unpack them
        most = tl.maximum(most, logit)
    total = tl.zeros([1, 1], tl.float32)
    raw = ()
    for k in tl.static_range(K):
        # Equal logits first: inf - inf is no distance.
        one = tl.where(logits[k] == most, 1.0, tl.exp(logits[k] - most))
        one = tl.where(logits[k] == float("-inf"), 0.0, one)
        raw = raw + (one,)  # noqa: RUF005
        total = total + one
    scale = tl.where(total == 0.0, 0.0, 1.0 / total)
    weights = ()
    for k in tl.static_range(K):
        weights = weights + (raw[k] * scale,)  # noqa: RUF005
    return weights, most


@triton.jit
def sigmoid_weights(
    logits_ptr, strides, stride_k, there, b, n, c, N, columns,
    K: tl.constexpr, PAIR: tl.constexpr,
    VEC: tl.constexpr, LOGIT_N: tl.constexpr, LOGIT_C: tl.constexpr,
):  # fmt: skip
    """K weights, 0 for what is absent, and their derivatives by the logit.

    PAIR: of one logit, z and 1 - z.
    """
    UNIT: tl.constexpr = VEC if LOGIT_C else 1
    weights = ()
    slopes = ()
    for k in tl.static_range(K):
        if PAIR:
            logit = load_side(logits_ptr, strides, b, n, c, N, columns, VEC, LOGIT_N, LOGIT_C)
            if k == 1:
                logit = -logit
        else:
            at = logits_ptr + k * stride_k.to(tl.int64) * UNIT
            logit = load_side(at, strides, b, n, c, N, columns, VEC, LOGIT_N, LOGIT_C)
        weight = sigmoid(logit)
        slope = weight * sigmoid(-logit)
        if PAIR and k == 1:
            slope = -slope
        if len(there) > 0:
            weight = tl.where(there[k], weight, 0.0)
            slope = tl.where(there[k], slope, 0.0)
        weights = weights + (weight,)  # noqa: RUF005
        slopes = slopes + (slope,)  # noqa: RUF005
    return weights, slopes


@triton.jit
def load_feature(ptr, strides, there, k: tl.constexpr, b, n, c, mask, VEC: tl.constexpr):
    """A tile of modality k in float32; what is absent is not read and counts as 0.

    strides: of every modality, as they come.
    """
    if len(there) > 0:
        mask = mask & there[k]
    return load_rows(ptr, stride_pair(strides[k]), b, n, c, mask, VEC)


@triton.jit(do_not_specialize=INTEGERS)
def fuse_fwd_kernel(
    out_ptr, x_ptrs, logits_ptr, present_ptr,
    x_strides, out_b, out_n, logit_b, logit_n, logit_k, present_b, present_n,
    N, C, tiles_n, tiles_c,
    MODE: tl.constexpr, LOGIT_N: tl.constexpr, LOGIT_C: tl.constexpr,
    VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x_strides: `unspecialised`. present_b, present_n: of rows; modalities are dense."""
    K: tl.constexpr = len(x_ptrs)
    b, n, c = first_tile(tiles_n, tiles_c, BLOCK_N, BLOCK_C)
    n += tl.arange(0, BLOCK_N)[:, None]
    columns = C.to(tl.int64) * VEC
    mask = (n < N) & (c < columns)
    there = load_present(present_ptr, (present_b, present_n), b, n, N, K)
    if MODE == 0:
        weights, _ = softmax_weights(
            logits_ptr, (logit_b, logit_n), logit_k, there, b, n, c, N, columns, K,
            VEC, LOGIT_N, LOGIT_C,
        )  # fmt: skip
    else:
        weights, _ = sigmoid_weights(
            logits_ptr, (logit_b, logit_n), logit_k, there, b, n, c, N, columns, K, MODE == 3,
            VEC, LOGIT_N, LOGIT_C,
        )  # fmt: skip
    out = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for k in tl.static_range(K):
        x = load_feature(x_ptrs[k], x_strides, there, k, b, n, c, mask, VEC)
        if MODE >= 2:
            x = tanh(x)
        out += weights[k] * x
    store_rows(out_ptr, (out_b, out_n), b, n, c, out, mask, VEC)


# --- launching ------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """A layout, and strides in the units that the kernels expect."""

    rows: Layout
    tensors: tuple[tuple[int, int], ...]
    logits: tuple[int, int, int]  # of rows, of modalities
    present: tuple[int, int]
    like: tuple[int, int, int]  # of dlogits, as of the logits
    logit_n: bool
    logit_c: bool


def plan(
    tensors: Sequence[Tensor],
    logits: Tensor,
    present: Tensor | None,
    *,
    swap: bool = False,
    free: bool = True,
    dlogits: Tensor | None = None,
) -> Plan:
    """How to walk over [B, N, C] `tensors` and logits `[B|1, N|1, K, C|1]` together.

    swap: items become rows. free: rows may be merged and swapped. dlogits: also walked, and of the
    logits' shape.
    """
    B, N, C = tensors[0].shape
    side = [logits] if dlogits is None else [logits, dlogits]
    dense = logits.shape[3] == C
    wide, slim = [row_strides(t) for t in tensors], [row_strides(t) for t in side]
    if present is not None:
        slim.append((present.stride(0) if B > 1 else 0, 0))
    if dense:
        wide, slim = wide + slim[: len(side)], slim[len(side) :]
    if swap:
        B, N = N, B
        wide, slim = [(n, b) for b, n in wide], [(n, b) for b, n in slim]
    steps_k = [t.stride(2) if t.shape[2] > 1 else 0 for t in side]
    rows = layout(
        (B, N, C),
        min(t.itemsize for t in ([*tensors, *side] if dense else tensors)),
        wide,
        slim,
        free=free,
        multiples=steps_k if dense else [],
    )
    found = [*rows.wide, *rows.narrow]
    count = len(tensors)
    unit = rows.vec if dense else 1
    sides = [(*found[count + i], step // unit) for i, step in enumerate(steps_k)]
    return Plan(
        rows,
        tuple(found[:count]),
        sides[0],
        found[-1] if present is not None else (0, 0),
        sides[-1],
        found[count][1] != 0,
        dense,
    )


def check(features: Sequence[Tensor]) -> None:
    """ValueError when the kernels cannot take so many modalities."""
    if len(features) > MAX_FEATURES:
        raise ValueError(
            f"fuse: {len(features)} features, the Triton kernels take up to {MAX_FEATURES}; "
            f"use another backend"
        )


def fuse_fwd(
    features: Sequence[Tensor], logits: Tensor, present: Tensor | None, mode: int
) -> Tensor:
    """The gated sum of `[B, N, C]` features.

    logits `[B|1, N|1, K, C|1]` (`[..., 1, C|1]` for mode 3), present `[B, K]` bool or None.
    mode: 0 softmax, 1 sigmoid, 2 GMU of many, 3 GMU of a pair with one logit.
    """
    check(features)
    out = empty_like_rows(features[0])
    if out.numel() == 0:
        return out
    at = plan([out, *features], logits, present)
    rows = at.rows
    # Each element's own logit is held beside its feature, where tanh takes registers too.
    terms = (2 * len(features) + 1 if mode == 2 else len(features)) if at.logit_c else 1
    tile = _tuning.tile(rows.columns, out.itemsize, terms)
    tiles_n, tiles_c = ceil_div(rows.N, tile.rows), ceil_div(rows.columns, tile.columns)
    launch(
        fuse_fwd_kernel,
        rows.B * tiles_n * tiles_c,
        out,
        tuple(features),
        logits,
        present,
        unspecialised(at.tensors[1:]),
        *at.tensors[0],
        *at.logits,
        *at.present,
        rows.N,
        rows.C,
        tiles_n,
        tiles_c,
        MODE=mode,
        LOGIT_N=at.logit_n,
        LOGIT_C=at.logit_c,
        VEC=rows.vec,
        BLOCK_N=tile.rows,
        BLOCK_C=tile.columns,
        num_warps=tile.warps,
        **_tuning.OPTIONS,
    )
    return out
