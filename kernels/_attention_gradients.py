"""Pieces of the attention kernels' backward: weights from the LSE, and the gradient of scores.

With P = exp(S - LSE) recomputed, and dP what comes in for P: dS = P * (dP - delta). For
`cross_attention` dP = dropout(dout @ v^T) and delta = rowsum(dout * out) - dLSE; for importance and
weights dP is what comes in for them, and delta is 0, because the LSE has a gradient of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mmfast.kernels._attention import LOG2E


@triton.jit
def load_statistics(lse_ptr, delta_ptr, b, h, n, live, sizes):
    """(LSE in units of log 2, delta) of rows; +inf and 0 where a row sees nothing.

    The weights of such a row come out as 2^-inf = 0. delta_ptr may be None.
    """
    row = (b.to(tl.int64) * sizes.G * sizes.heads + h) * sizes.N + n
    lse = tl.load(lse_ptr + row, mask=live, other=float("-inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.zeros(lse.shape, tl.float32)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + row, mask=live, other=0.0)
    return lse, delta


@triton.jit
def pair_gradients(
    dimportance_ptr, dweights_ptr, weight_factor, b, h, n, m, rows, keys, sizes,
    FORM: tl.constexpr,
):  # fmt: skip
    """What comes in for P of rows (b, h, n) and keys m, `[rows, keys]` or its transpose, float32.

    dimportance is `[B, H, M]`, dweights `[B, N, M]` (for the head mean: its factor is 1 / H) or
    `[B, H, N, M]`, both contiguous; either may be None.
    """
    H = sizes.G * sizes.heads
    pairs = rows & keys
    dp = tl.zeros(pairs.shape, tl.float32)
    if dimportance_ptr is not None:
        position = (b.to(tl.int64) * H + h) * sizes.M + m
        pointers = tl.broadcast_to(dimportance_ptr + position, pairs.shape)
        dp += tl.load(pointers, mask=pairs, other=0.0)
    if FORM.weights == 2:
        position = ((b.to(tl.int64) * H + h) * sizes.N + n) * sizes.M + m
        dp += tl.load(dweights_ptr + position, mask=pairs, other=0.0).to(tl.float32)
    elif FORM.weights == 1:
        position = (b.to(tl.int64) * sizes.N + n) * sizes.M + m
        dp += tl.load(dweights_ptr + position, mask=pairs, other=0.0).to(tl.float32) * weight_factor
    return dp
