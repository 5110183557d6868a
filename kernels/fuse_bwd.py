"""Gated sum of K modalities, backward: the result's gradient and the features are read once, the
features' gradients written once, and the logits' gradients summed on the way.

With d_k what the gradient of weight k is (`dout * x_k`, of `tanh(x_k)` for GMU) and summed over the
channels that share a logit: softmax `dl_k = w_k (d_k - sum_j w_j d_j)`, sigmoid `s (1 - s) d_k`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from mmfast.kernels import _tuning
from mmfast.kernels._blocks import (
    column_sums,
    first_tile,
    load_rows,
    row_offset,
    store_rows,
    stride_pair,
    tanh,
)
from mmfast.kernels._launch import ceil_div, empty_like_rows, launch, unspecialised
from mmfast.kernels.fuse import (
    INTEGERS,
    check,
    load_feature,
    load_present,
    plan,
    sigmoid_weights,
    softmax_weights,
)
from torch import Tensor


@triton.jit
def _softmax_slope(weight, d, mean, most):
    """dl_k. Where a logit is +inf the weights are constants: 0, unless a NaN is there."""
    fixed = (most == float("inf")) & (weight == weight)
    return tl.where(fixed, 0.0, weight * (d - mean))


@triton.jit
def _logit_gradient(k: tl.constexpr, weights, slopes, parts, mean, most, MODE: tl.constexpr):
    """dl_k from the gradients of the weights, `parts`, and for the softmax their mean."""
    if MODE == 0:
        dl = _softmax_slope(weights[k], parts[k], mean, most)
    elif MODE == 3:
        dl = slopes[0] * parts[0] + slopes[1] * parts[1]
    else:
        dl = slopes[k] * parts[k]
    return dl


@triton.jit
def _feature_gradient(dout, x, weight, there, k: tl.constexpr, TANH: tl.constexpr):
    """dx_k, and what an element adds to d_k; 0 for what is absent."""
    if TANH:
        value = tanh(x)
        dx = dout * weight * (1.0 - value * value)
    else:
        value = x
        dx = dout * weight
    d = dout * value
    if len(there) > 0:
        dx = tl.where(there[k], dx, 0.0)
        d = tl.where(there[k], d, 0.0)
    return dx, d


@triton.jit
def _weights(
    logits_ptr, strides, stride_k, there, b, n, c, N, columns, K: tl.constexpr, MODE: tl.constexpr,
    VEC: tl.constexpr, LOGIT_N: tl.constexpr, LOGIT_C: tl.constexpr,
):  # fmt: skip
    """K weights, then what their gradients need: (slopes, largest logit), one of them unused."""
    if MODE == 0:
        weights, most = softmax_weights(
            logits_ptr, strides, stride_k, there, b, n, c, N, columns, K, VEC, LOGIT_N, LOGIT_C
        )
        slopes = weights
    else:
        weights, slopes = sigmoid_weights(
            logits_ptr, strides, stride_k, there, b, n, c, N, columns, K, MODE == 3,
            VEC, LOGIT_N, LOGIT_C,
        )  # fmt: skip
        most = 0.0
    return weights, slopes, most


@triton.jit(do_not_specialize=INTEGERS)
def fuse_bwd_kernel(
    dout_ptr, x_ptrs, dx_ptrs, dlogits_ptr, logits_ptr, present_ptr,
    x_strides, dx_strides, dout_b, dout_n, dlogit_b, dlogit_n, dlogit_k,
    logit_b, logit_n, logit_k, present_b, present_n, N, C, tiles_n, tiles_c, chunk,
    MODE: tl.constexpr, LOGIT_N: tl.constexpr, LOGIT_C: tl.constexpr, SUM: tl.constexpr,
    VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Element by element: logits with channels, or no gradient of logits.

    A program takes `chunk` rows of an item and a block of columns. SUM: dlogits is
    `[items x chunks, K, C]`, sums over the chunk's rows.
    """
    K: tl.constexpr = len(x_ptrs)
    L: tl.constexpr = 1 if MODE == 3 else K
    b, first, c = first_tile(tiles_n, tiles_c, chunk, BLOCK_C)
    last = tl.minimum(first + chunk, N)
    columns = C.to(tl.int64) * VEC
    totals = ()
    for _ in tl.static_range(L):
        totals = totals + (tl.zeros([BLOCK_N, BLOCK_C], tl.float32),)  # noqa: RUF005
    SHARED: tl.constexpr = (present_ptr is None) and not LOGIT_N  # by all rows: computed once
    if SHARED:
        weights, slopes, most = _weights(
            logits_ptr, (logit_b, logit_n), logit_k, (), b, first, c, N, columns, K, MODE,
            VEC, LOGIT_N, LOGIT_C,
        )  # fmt: skip
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        mask = (n < last) & (c < columns)
        there = load_present(present_ptr, (present_b, present_n), b, n, N, K)
        if not SHARED:
            weights, slopes, most = _weights(
                logits_ptr, (logit_b, logit_n), logit_k, there, b, n, c, N, columns, K, MODE,
                VEC, LOGIT_N, LOGIT_C,
            )  # fmt: skip
        dout = load_rows(dout_ptr, (dout_b, dout_n), b, n, c, mask, VEC)
        mean = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        parts = ()
        for k in tl.static_range(K):
            x = load_feature(x_ptrs[k], x_strides, there, k, b, n, c, mask, VEC)
            dx, d = _feature_gradient(dout, x, weights[k], there, k, MODE >= 2)
            if dx_ptrs is not None:
                store_rows(dx_ptrs[k], stride_pair(dx_strides[k]), b, n, c, dx, mask, VEC)
            if MODE == 0:
                mean += weights[k] * d
            parts = parts + (d,)  # noqa: RUF005
        if dlogits_ptr is not None:
            sums = ()
            for k in tl.static_range(L):
                dl = _logit_gradient(k, weights, slopes, parts, mean, most, MODE)
                if SUM:
                    sums = sums + (totals[k] + tl.where(mask, dl, 0.0),)  # noqa: RUF005
                else:
                    at = dlogits_ptr + k * dlogit_k.to(tl.int64) * VEC
                    store_rows(at, (dlogit_b, dlogit_n), b, n, c, dl, mask, VEC)
            if SUM:
                totals = sums
    if SUM:
        row = b * tiles_n + first // chunk
        for k in tl.static_range(L):
            part = tl.sum(totals[k], axis=0, keep_dims=True).to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + (row * L + k) * columns + c, part, mask=c < columns)


@triton.jit(do_not_specialize=INTEGERS)
def fuse_bwd_rows_kernel(
    dout_ptr, x_ptrs, dx_ptrs, dlogits_ptr, logits_ptr, present_ptr,
    x_strides, dx_strides, dout_b, dout_n, dlogit_b, dlogit_n, dlogit_k,
    logit_b, logit_n, logit_k, present_b, present_n, N, C, tiles_n, chunk,
    MODE: tl.constexpr, LOGIT_N: tl.constexpr, SUM: tl.constexpr,
    VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Logits without channels: a program takes `chunk` rows of an item, all of their columns.

    SUM: dlogits is `[items x chunks, K]`, sums over the chunk's rows.
    """
    K: tl.constexpr = len(x_ptrs)
    L: tl.constexpr = 1 if MODE == 3 else K
    b, first, c0 = first_tile(tiles_n, 1, chunk, BLOCK_C)
    last = tl.minimum(first + chunk, N)
    columns = C.to(tl.int64) * VEC
    totals = ()
    for _ in tl.static_range(L):
        totals = totals + (tl.zeros([BLOCK_N, 1], tl.float32),)  # noqa: RUF005
    SHARED: tl.constexpr = (present_ptr is None) and not LOGIT_N
    if SHARED:
        weights, slopes, most = _weights(
            logits_ptr, (logit_b, logit_n), logit_k, (), b, first, c0, N, columns, K, MODE,
            VEC, LOGIT_N, False,
        )  # fmt: skip
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        rows = n < last
        there = load_present(present_ptr, (present_b, present_n), b, n, N, K)
        if not SHARED:
            weights, slopes, most = _weights(
                logits_ptr, (logit_b, logit_n), logit_k, there, b, n, c0, N, columns, K, MODE,
                VEC, LOGIT_N, False,
            )  # fmt: skip
        sums = ()
        for _ in tl.static_range(K):
            sums = sums + (tl.zeros([BLOCK_N, BLOCK_C], tl.float32),)  # noqa: RUF005
        for column in range(0, columns, BLOCK_C):
            c = column + c0
            mask = rows & (c < columns)
            dout = load_rows(dout_ptr, (dout_b, dout_n), b, n, c, mask, VEC)
            added = ()
            for k in tl.static_range(K):
                x = load_feature(x_ptrs[k], x_strides, there, k, b, n, c, mask, VEC)
                dx, d = _feature_gradient(dout, x, weights[k], there, k, MODE >= 2)
                if dx_ptrs is not None:
                    store_rows(dx_ptrs[k], stride_pair(dx_strides[k]), b, n, c, dx, mask, VEC)
                added = added + (sums[k] + d,)  # noqa: RUF005
            sums = added
        mean = tl.zeros([BLOCK_N, 1], tl.float32)
        parts = ()
        for k in tl.static_range(K):
            d = tl.sum(sums[k], axis=1, keep_dims=True)
            if MODE == 0:
                mean += weights[k] * d
            parts = parts + (d,)  # noqa: RUF005
        added = ()
        for k in tl.static_range(L):
            dl = _logit_gradient(k, weights, slopes, parts, mean, most, MODE)
            if SUM:
                added = added + (totals[k] + tl.where(rows, dl, 0.0),)  # noqa: RUF005
            else:
                at = dlogits_ptr + k * dlogit_k.to(tl.int64)
                at += row_offset((dlogit_b, dlogit_n), b, n, 1)
                tl.store(at, dl.to(dlogits_ptr.dtype.element_ty), mask=rows)
        if SUM:
            totals = added
    if SUM:
        row = b * tiles_n + first // chunk
        for k in tl.static_range(L):
            part = tl.sum(totals[k]).to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + row * L + k, part)


def fuse_bwd(
    dout: Tensor,
    features: Sequence[Tensor],
    logits: Tensor,
    present: Tensor | None,
    mode: int,
    need_dfeatures: bool,
    need_dlogits: bool,
) -> tuple[list[Tensor], Tensor]:
    """(dfeatures, dlogits); [] and `[0]` where they are not needed."""
    check(features)
    dx = [empty_like_rows(x) for x in features] if need_dfeatures else []
    dlogits = logits.new_empty(logits.shape if need_dlogits else 0)
    B, N, C = dout.shape
    if dout.numel() == 0:
        return dx, dlogits.zero_()
    if not dx and not need_dlogits:
        return dx, dlogits

    kept = [logits.shape[0] == B, logits.shape[1] == N]
    sums = need_dlogits and not all(kept)
    one_sum = not any(kept)
    dense = logits.shape[3] == C
    at = plan(
        [dout, *features, *dx],
        logits,
        present,
        swap=sums and kept[1],
        free=not sums or one_sum,
        dlogits=dlogits if need_dlogits and not sums else None,
    )
    rows, K = at.rows, len(features)
    by_row = need_dlogits and not dense
    terms = 3 * K + 1 if need_dlogits else K + 1
    tile = _tuning.tile(rows.columns, dout.itemsize, terms)
    tiles_c = 1 if by_row else ceil_div(rows.columns, tile.columns)
    chunk = _tuning.chunk_rows(rows.N, rows.B * tiles_c, tile.rows) if sums else tile.rows
    tiles_n = ceil_div(rows.N, chunk)

    target: Tensor | None = dlogits if need_dlogits else None
    parts, width = rows.B * tiles_n, logits.shape[2] * logits.shape[3]
    group = parts if one_sum else tiles_n
    if sums and group > 1:
        target = dlogits.new_empty((1, parts, width), dtype=torch.float32)
    arguments = (
        dout, tuple(features), tuple(dx) or None, target, logits, present,
        unspecialised(at.tensors[1 : 1 + K]), unspecialised(at.tensors[1 + K :]) or None,
        *at.tensors[0], *at.like, *at.logits, *at.present, rows.N, rows.C, tiles_n,
    )  # fmt: skip
    constants = {
        "MODE": mode,
        "LOGIT_N": at.logit_n,
        "SUM": sums,
        "VEC": rows.vec,
        "BLOCK_N": tile.rows,
        "BLOCK_C": tile.columns,
        "num_warps": tile.warps,
        **_tuning.OPTIONS,
    }
    if by_row:
        launch(fuse_bwd_rows_kernel, parts, *arguments, chunk, **constants)
    else:
        programs = parts * tiles_c
        launch(fuse_bwd_kernel, programs, *arguments, tiles_c, chunk, LOGIT_C=dense, **constants)
    if sums and group > 1:
        assert target is not None
        column_sums(target, [dlogits], group)
    return dx, dlogits
