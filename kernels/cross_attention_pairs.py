"""Sums over the pairs of an attention that have no owner among tiles of rows or of keys.

One kernel: a program owns a tile of pairs of the result and goes over everything that the result
sums over, in order, recomputing P = exp(S - LSE) each time: batch items and heads that a bias is
broadcast over, heads for their mean weights, rows for the importance of keys. No score matrix per
head is in memory, unless it is the result itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from mmfast.kernels import _tuning
from mmfast.kernels._attention import (
    dropout_keep,
    first_row,
    inner,
    length,
    load_bias,
    load_keys,
    load_queries,
    may_attend,
)
from mmfast.kernels._attention_call import INTEGERS, Call, Form, Given, Sizes, strides_of
from mmfast.kernels._attention_gradients import load_statistics, pair_gradients
from mmfast.kernels._launch import ceil_div, launch
from torch import Tensor

if TYPE_CHECKING:
    from mmfast.kernels.cross_attention_bwd import Gradients

WEIGHTS, FROM_OUTPUT, FROM_PAIRS = 0, 1, 2
"""What is summed: P; dS of what came in for the output; dS of what came in for P."""


@triton.jit(do_not_specialize=[*INTEGERS, "tiles_n", "tiles_m", "outer_h", "loop_b", "loop_h",
                               "loop_n"])  # fmt: skip
def cross_attention_pairs_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, out_ptr, dimportance_ptr, dweights_ptr,
    kv_lens, q_lens, q_segments, kv_segments, mask, bias_ptr, q_starts, kv_starts, seed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dout_b, dout_h, dout_n,
    mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, threshold, heads, G, N, M,
    scale, keep_scale, weight_factor, factor, tiles_n, tiles_m, outer_h, loop_b, loop_h, loop_n,
    FORM: tl.constexpr, WHAT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out is `[outer b, outer h, N, M]`, or without N (COLUMNS), contiguous: `factor` x the sum.

    The grid runs over key tiles, row tiles (one with COLUMNS), outer heads, outer items; a program
    over loop_b items, loop_h heads and loop_n row tiles.
    """
    sizes = Sizes(heads, G, N, M)
    given = Given(
        kv_lens, q_lens, q_segments, kv_segments, mask, bias_ptr, (mask_b, mask_h, mask_n),
        (bias_b, bias_h, bias_n), seed, threshold,
    )  # fmt: skip
    pid = tl.program_id(0)
    start = (pid % tiles_m) * FORM.block_m
    first = (pid // tiles_m) % tiles_n
    outer = pid // tiles_m // tiles_n
    key = start + tl.arange(0, FORM.block_m)
    total = tl.zeros([FORM.block_n, FORM.block_m], tl.float32)
    for step in tl.range(0, loop_b * loop_h * loop_n):
        b = outer // outer_h + step // (loop_h * loop_n)
        h = outer % outer_h + (step // loop_n) % loop_h
        begin = (first + step % loop_n) * FORM.block_n
        kv_end = length(kv_lens, b, M)
        q_end = length(q_lens, b, N)
        if (start < kv_end) & (begin < q_end):
            n = begin + tl.arange(0, FORM.block_n)
            live = n < q_end
            g = h // heads
            position = (b.to(tl.int64) * k_b + g.to(tl.int64) * k_h) * FORM.vec
            here = key < kv_end
            first_key, row_of_item = first_row(kv_starts, b), first_row(q_starts, b)
            k = load_keys(
                k_ptr + position, None, b, g, k_n, first_key + start, here, FORM.qk, FORM
            )  # fmt: skip
            q = load_queries(
                q_ptr, (q_b, q_h, q_n), b, h, row_of_item, begin, n, live, FORM.qk, FORM
            )  # fmt: skip
            lse, delta = load_statistics(lse_ptr, delta_ptr, b, h, n, live, sizes)
            rows, m = n[:, None], key[None, :]
            own = n
            if q_segments is not None:
                own = tl.load(q_segments + b.to(tl.int64) * N + n, mask=live, other=0)
            allowed = may_attend(
                b, h, rows, m, live[:, None], kv_end, kv_end - q_end, own[:, None], given, M,
                False, FORM,
            )  # fmt: skip
            bias = load_bias(b, h, rows, m, live[:, None], kv_end, given, False, FORM)
            value = tl.exp2(inner(q, k, FORM.precision) * scale + bias - lse[:, None])
            if WHAT == 1:
                position = (b.to(tl.int64) * v_b + g.to(tl.int64) * v_h) * FORM.vec
                v = load_keys(
                    v_ptr + position, None, b, g, v_n, first_key + start, here, FORM.v, FORM
                )  # fmt: skip
                dout = load_queries(
                    dout_ptr, (dout_b, dout_h, dout_n), b, h, row_of_item, begin, n, live,
                    FORM.v, FORM,
                )  # fmt: skip
                dp = inner(dout, v, FORM.precision)
                if FORM.dropout:
                    keep = dropout_keep(b, h, n, start, given, sizes, FORM)
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                value *= dp - delta[:, None]
            elif WHAT == 2:
                value *= pair_gradients(
                    dimportance_ptr, dweights_ptr, weight_factor, b, h, rows, m, live[:, None],
                    m < kv_end, sizes, FORM,
                )  # fmt: skip
            total += tl.where(allowed, value, 0.0)

    total *= factor
    if COLUMNS:
        at = outer.to(tl.int64) * M + key
        tl.store(out_ptr + at, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=key < M)
    else:
        n = first * FORM.block_n + tl.arange(0, FORM.block_n)[:, None]
        at = (outer.to(tl.int64) * N + n) * M + key[None, :]
        tl.store(
            out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=(n < N) & (key[None, :] < M)
        )  # fmt: skip


def sum_pairs(
    call: Call,
    form: Form,
    what: int,
    lse: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    factor: float = 1.0,
    *,
    dout: Tensor | None = None,
    delta: Tensor | None = None,
    dimportance: Tensor | None = None,
    dweights: Tensor | None = None,
    weight_factor: float = 1.0,
) -> Tensor:
    """`factor` times the sum of `what` over everything that `shape` does not have.

    shape: `[B|1, H|1, N, M]`, or `[B|1, H|1, M]` for a sum over the rows as well. form: with the
    vec of all tensors given.
    """
    out = torch.empty(shape, dtype=dtype, device=lse.device)
    columns = len(shape) == 3
    tile = call.tile("pairs")
    tiles_n, tiles_m = ceil_div(call.N, tile.rows), ceil_div(call.M, tile.keys)
    outer_b, outer_h = shape[:2]
    values = what == FROM_OUTPUT
    strides = [
        (0, 0, 0) if tensor is None else strides_of(tensor, form.vec)
        for tensor in (call.q, call.k, call.v if values else None, dout)
    ]
    launch(
        cross_attention_pairs_kernel,
        outer_b * outer_h * tiles_m * (1 if columns else tiles_n),
        call.q, call.k, call.v if values else None, dout, lse, delta, out, dimportance, dweights,
        *call.given, *strides[0], *strides[1], *strides[2], *strides[3], *call.sizes,
        call.signed_scale, call.keep_scale, weight_factor, factor, 1 if columns else tiles_n,
        tiles_m, outer_h, call.B // outer_b if outer_b else 0, call.H // outer_h,
        tiles_n if columns else 1,
        FORM=form._replace(block_n=tile.rows, block_m=tile.keys, packed=False), WHAT=what,
        COLUMNS=columns, num_warps=tile.warps, num_stages=tile.stages, **_tuning.OPTIONS,
    )  # fmt: skip
    return out


def bias_gradient_by_pairs(passes: Gradients, bias: Tensor) -> Tensor:
    """The gradient of a bias that has the keys' dim and is broadcast over another."""
    call = passes.call
    B, H, N, M = bias.shape
    what = FROM_PAIRS if call.v is None else FROM_OUTPUT
    given = {
        "dout": passes.dout, "delta": passes.delta, "dimportance": passes.dimportance,
        "dweights": passes.dweights, "weight_factor": passes.factor,
    }  # fmt: skip
    if call.N == N:
        return sum_pairs(
            call, passes.form, what, passes.lse, (B, H, N, M), bias.dtype, **given
        )  # fmt: skip
    # A program for each item and head, rather than few that go over all of them.
    columns = sum_pairs(
        call, passes.form, what, passes.lse, (call.B, call.H, M), torch.float32, **given
    )
    return columns[:, :, None].sum_to_size(bias.shape).to(bias.dtype)
