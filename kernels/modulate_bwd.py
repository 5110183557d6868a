"""The backward of `modulate`: every gradient in one pass over the data.

With `xhat = norm(h)`, `u = xhat * weight + bias` and `g = dout * (1 + scale) * weight`:

    dh        = dh + rstd * (g - mean(g) - xhat * mean(g * xhat))      (rms: without mean(g))
    dresidual = dh;  dx = gate * dh;  dgate = sum(dh * x)
    dscale    = sum(dout * u);  dshift = sum(dout)
    dweight   = sum(dout * (1 + scale) * xhat);  dbias = sum(dout * (1 + scale))

Each sum is over the rows that its argument was broadcast over. A program takes a chunk of rows and
keeps its column sums in registers; `column_sums_kernel` adds the chunks in a fixed order. Rows past
`MAX_TILE_C` are split into blocks of columns, after a kernel that writes what is needed of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from mmfast.kernels import _launch
from mmfast.kernels._blocks import column_sums
from mmfast.kernels._launch import ceil_div, empty_like_rows, power_of_two
from mmfast.kernels._rows import (
    flat_start,
    floats,
    load_columns,
    load_rows,
    merge_moments,
    row_offset,
    smallest_itemsize,
    store_rows,
    strides_of,
    sum_chunks,
    wrap_rows,
)
from mmfast.kernels._tuning import OPTIONS, chunk_rows
from torch import Tensor

NONE = 0
MAX_TILE_C = 8192
_LOOP_C = 4096
_SPLIT_C = 1024
_TILE = 1024  # elements of a tile of short rows: 8 a thread with 4 warps, beside the sums

_INTS = [
    f"stride_{name}_{dim}"
    for name in ("dout", "dh", "x", "h", "g", "s", "dx", "dr", "dg", "ds", "dt")
    for dim in "bn"
] + ["total_rows", "N", "C", "chunk"]
_STATS_INTS = [f"stride_{name}_{dim}" for name in ("dout", "h", "s") for dim in "bn"] + ["N", "C"]


@triton.jit(do_not_specialize=_INTS)
def modulate_bwd_kernel(
    x_ptr, dout_ptr, dh_ptr, h_ptr, gate_ptr, scale_ptr, weight_ptr, bias_ptr, stats_ptr,
    dx_ptr, dresidual_ptr, dgate_ptr, dscale_ptr, dshift_ptr,
    sum_gate_ptr, sum_scale_ptr, sum_shift_ptr, sum_weight_ptr, sum_bias_ptr,
    stride_x_b, stride_x_n, stride_dout_b, stride_dout_n, stride_dh_b, stride_dh_n,
    stride_h_b, stride_h_n, stride_g_b, stride_g_n, stride_s_b, stride_s_n,
    stride_dx_b, stride_dx_n, stride_dr_b, stride_dr_n, stride_dg_b, stride_dg_n,
    stride_ds_b, stride_ds_n, stride_dt_b, stride_dt_n,
    total_rows, N, C, chunk, eps,
    VEC: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr, SCALE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A chunk of rows, of one item or (`FLAT`) of several; `SPLIT`: one block of its columns.

    d<name>_ptr is the gradient of an argument that is not broadcast, sum_<name>_ptr `[chunks, C]`
    the chunks' sums of one that is. Where all rows of a chunk share `scale`, its factor comes out
    of the sums and two of them serve scale, shift, weight and bias.
    """
    C = C * VEC
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    if SPLIT:
        blocks = tl.cdiv(C, BLOCK_C)
        cols += (pid % blocks) * BLOCK_C
        pid = pid // blocks
    if FLAT:
        begin = pid.to(tl.int64) * chunk
        first_b, first_n = flat_start(begin, N)
        count = tl.minimum(total_rows - begin, chunk).to(tl.int32)
    else:
        chunks = tl.cdiv(N, chunk)
        b = pid // chunks
        first_n = (pid % chunks) * chunk
        count = tl.minimum(N - first_n, chunk)

    DATA: tl.constexpr = dx_ptr is not None or dresidual_ptr is not None
    GATE: tl.constexpr = dgate_ptr is not None or sum_gate_ptr is not None
    WHOLE_WEIGHT: tl.constexpr = sum_weight_ptr is not None and not SCALE_ROWS
    WHOLE_BIAS: tl.constexpr = sum_bias_ptr is not None and not SCALE_ROWS
    BIASED: tl.constexpr = sum_scale_ptr is not None and bias_ptr is not None
    SUM_D: tl.constexpr = sum_shift_ptr is not None or WHOLE_BIAS or BIASED
    SUM_DX: tl.constexpr = sum_scale_ptr is not None or WHOLE_WEIGHT
    SUM_U: tl.constexpr = sum_bias_ptr is not None and SCALE_ROWS
    SUM_UX: tl.constexpr = sum_weight_ptr is not None and SCALE_ROWS
    sum_d = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    sum_dx = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    sum_u = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    sum_ux = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    sum_g = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)

    for start in range(0, count, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        live = rows < count
        n = first_n + rows
        if FLAT:
            b, n = wrap_rows(first_b, n, N)
        mask = live[:, None] & (cols < C)[None, :]
        if DATA or GATE:
            grad = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
            if dh_ptr is not None:
                grad = load_rows(
                    dh_ptr, row_offset(b, n, stride_dh_b, stride_dh_n, VEC), cols, mask
                )
        if dout_ptr is not None:
            dout = load_rows(
                dout_ptr, row_offset(b, n, stride_dout_b, stride_dout_n, VEC), cols, mask
            )
            xhat = load_rows(h_ptr, row_offset(b, n, stride_h_b, stride_h_n, VEC), cols, mask)
            if stats_ptr is not None:
                stats = stats_ptr + (b.to(tl.int64) * N + n) * 4
                rstd = tl.load(stats, mask=live, other=0.0)[:, None]
                if NORM == 1:
                    mean = tl.load(stats + 1, mask=live, other=0.0)[:, None]
                    xhat = tl.where(mask, xhat - mean, 0.0)
                xhat *= rstd
            elif NORM != 0:
                if NORM == 1:
                    mean = tl.sum(xhat, axis=1) / C
                    xhat = tl.where(mask, xhat - mean[:, None], 0.0)
                rstd = tl.rsqrt(tl.sum(xhat * xhat, axis=1) / C + tl.cast(eps, tl.float32))[:, None]
                # eps = 0: rows past the end would be 0 * inf
                xhat = tl.where(mask, xhat * rstd, 0.0)
            if SUM_D:
                sum_d += dout
            if SUM_DX:
                sum_dx += dout * xhat
            if dshift_ptr is not None:
                offset = row_offset(b, n, stride_dt_b, stride_dt_n, VEC)
                store_rows(dshift_ptr, offset, cols, dout, mask)
            if dscale_ptr is not None:
                u = xhat
                if weight_ptr is not None:
                    u *= load_columns(weight_ptr, cols, mask)
                if bias_ptr is not None:
                    u += load_columns(bias_ptr, cols, mask)
                offset = row_offset(b, n, stride_ds_b, stride_ds_n, VEC)
                store_rows(dscale_ptr, offset, cols, dout * u, mask)
            if scale_ptr is not None:
                dout *= 1.0 + load_rows(
                    scale_ptr, row_offset(b, n, stride_s_b, stride_s_n, VEC), cols, mask
                )
            if SUM_U:
                sum_u += dout
            if SUM_UX:
                sum_ux += dout * xhat
            if DATA or GATE:
                if weight_ptr is not None:
                    dout *= load_columns(weight_ptr, cols, mask)
                if stats_ptr is not None:
                    along = tl.load(stats + 2, mask=live, other=0.0)[:, None]
                    if NORM == 1:
                        dout -= tl.load(stats + 3, mask=live, other=0.0)[:, None]
                    dout = rstd * (dout - xhat * along)
                elif NORM != 0:
                    along = tl.sum(dout * xhat, axis=1) / C
                    if NORM == 1:
                        dout -= (tl.sum(dout, axis=1) / C)[:, None]
                    dout = rstd * (dout - xhat * along[:, None])
                grad += dout
        if dresidual_ptr is not None:
            offset = row_offset(b, n, stride_dr_b, stride_dr_n, VEC)
            store_rows(dresidual_ptr, offset, cols, grad, mask)
        if GATE:
            x = load_rows(x_ptr, row_offset(b, n, stride_x_b, stride_x_n, VEC), cols, mask)
            dgate = tl.where(mask, grad * x, 0.0)
            if sum_gate_ptr is not None:
                sum_g += dgate
            else:
                offset = row_offset(b, n, stride_dg_b, stride_dg_n, VEC)
                store_rows(dgate_ptr, offset, cols, dgate, mask)
        if dx_ptr is not None:
            if gate_ptr is not None:
                grad *= load_rows(
                    gate_ptr, row_offset(b, n, stride_g_b, stride_g_n, VEC), cols, mask
                )
            store_rows(dx_ptr, row_offset(b, n, stride_dx_b, stride_dx_n, VEC), cols, grad, mask)

    out = pid.to(tl.int64) * C + cols
    keep = cols < C
    if sum_gate_ptr is not None:
        tl.store(sum_gate_ptr + out, tl.sum(sum_g, axis=0), mask=keep)
    if SUM_D:
        total_d = tl.sum(sum_d, axis=0)
    if SUM_DX:
        total_dx = tl.sum(sum_dx, axis=0)
    if sum_shift_ptr is not None:
        tl.store(sum_shift_ptr + out, total_d, mask=keep)
    if sum_scale_ptr is not None:
        dscale = total_dx
        if weight_ptr is not None:
            dscale *= tl.load(weight_ptr + cols, mask=keep, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            dscale += total_d * tl.load(bias_ptr + cols, mask=keep, other=0.0).to(tl.float32)
        tl.store(sum_scale_ptr + out, dscale, mask=keep)
    if SUM_U:
        tl.store(sum_bias_ptr + out, tl.sum(sum_u, axis=0), mask=keep)
    if SUM_UX:
        tl.store(sum_weight_ptr + out, tl.sum(sum_ux, axis=0), mask=keep)
    if WHOLE_BIAS or WHOLE_WEIGHT:
        factor = tl.full([BLOCK_C], 1.0, tl.float32)
        if scale_ptr is not None:
            shared = scale_ptr
            if not FLAT:
                shared += b.to(tl.int64) * stride_s_b * VEC
            factor += tl.load(shared + cols, mask=keep, other=0.0).to(tl.float32)
        if WHOLE_BIAS:
            tl.store(sum_bias_ptr + out, total_d * factor, mask=keep)
        if WHOLE_WEIGHT:
            tl.store(sum_weight_ptr + out, total_dx * factor, mask=keep)


@triton.jit(do_not_specialize=_STATS_INTS)
def modulate_bwd_stats_kernel(
    dout_ptr, h_ptr, scale_ptr, weight_ptr, stats_ptr,
    stride_dout_b, stride_dout_n, stride_h_b, stride_h_n, stride_s_b, stride_s_n, N, C, eps,
    VEC: tl.constexpr, NORM: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`rstd, mean, mean(g * xhat), mean(g)` of one long row, read twice."""
    C = C * VEC
    row = tl.program_id(0)
    b = row // N
    n = row % N + tl.arange(0, 1)
    mean = tl.zeros([1], tl.float32)
    m2 = tl.zeros([1], tl.float32)
    count = 0.0
    at_h = row_offset(b, n, stride_h_b, stride_h_n, VEC)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = (cols < C)[None, :]
        h = load_rows(h_ptr, at_h, cols, mask)
        if NORM == 1:
            width = tl.minimum(C - start, BLOCK_C).to(tl.float32)
            mean, m2, count = merge_moments(mean, m2, count, h, mask, width)
        else:
            m2 += tl.sum(h * h, axis=1)
    rstd = tl.rsqrt(m2 / C + tl.cast(eps, tl.float32))
    sum_g = tl.zeros([1, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([1, BLOCK_C], tl.float32)
    at_dout = row_offset(b, n, stride_dout_b, stride_dout_n, VEC)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = (cols < C)[None, :]
        grad = load_rows(dout_ptr, at_dout, cols, mask)
        if scale_ptr is not None:
            grad *= 1.0 + load_rows(
                scale_ptr, row_offset(b, n, stride_s_b, stride_s_n, VEC), cols, mask
            )
        if weight_ptr is not None:
            grad *= load_columns(weight_ptr, cols, mask)
        h = load_rows(h_ptr, at_h, cols, mask)
        sum_g += grad
        sum_gx += grad * ((h - mean[:, None]) * rstd[:, None])
    stats = stats_ptr + row.to(tl.int64) * 4 + tl.arange(0, 1)
    tl.store(stats, rstd)
    tl.store(stats + 1, mean)
    tl.store(stats + 2, tl.sum(sum_gx, axis=1) / C)
    tl.store(stats + 3, tl.sum(sum_g, axis=1) / C)


_NAMES = ("dx", "dresidual", "dgate", "dscale", "dshift", "dweight", "dbias")
_DIRECT, _ITEM, _ALL, _ROW = "direct", "item", "all", "row"


def modulate_bwd(
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
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`dx, dresidual, dgate, dscale, dshift, dweight, dbias`, each like its argument.

    Args:
        dout, dh: gradients of the two results, `[B, N, C]` with last stride 1; None counts as 0.
        x, h: as in the forward; h is given iff there was a residual.
        shift: for its shape and dtype only.
        needs: which of the seven are asked for, in this order; the others come as `[0]`.
    """
    h = x if h is None else h
    like = (x, h, gate, scale, shift, weight, bias)
    grads: dict[str, Tensor] = {}
    for name, tensor, needed in zip(_NAMES, like, needs):
        if needed and tensor is not None:
            rows = tensor.dim() == 3
            grads[name] = empty_like_rows(tensor) if rows else tensor.new_empty(tensor.shape)
    results = tuple(grads[name] if name in grads else x.new_empty(0) for name in _NAMES)
    for name in list(grads):
        if x.numel() == 0 or (dout is None and name in _NAMES[3:]):
            grads.pop(name).zero_()
    if grads:
        _run(grads, (x, dout, dh, h, gate, scale, weight, bias), norm, eps)
    return results


def bwd_tile(C: int, norm: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and its warps."""
    block = power_of_two(C)
    if norm == NONE or block > MAX_TILE_C:
        block = min(block, _SPLIT_C)
    rows = max(1, _TILE // block)
    return rows, block, min(max(4, rows * block // 256), 16)


def _run(grads: dict[str, Tensor], data: tuple[Tensor | None, ...], norm: int, eps: float) -> None:
    B, N, C = data[0].shape
    kinds = {name: _kind(grad, B, N) for name, grad in grads.items()}
    if _ROW in kinds.values() and _ITEM not in kinds.values():
        # Sums over the items alone: with items and rows exchanged they are sums over rows.
        turned = {name: _turn(grad) for name, grad in grads.items()}
        _run(turned, tuple(_turn(t) for t in data), norm, eps)
        return
    flat = _ITEM not in kinds.values()
    items, length = (1, B * N) if flat else (B, N)
    rows, block, warps = bwd_tile(C, norm)
    rows = min(rows, power_of_two(length))
    blocks = ceil_div(C, block)
    chunk = chunk_rows(length, items * blocks * (warps // 4), rows)
    chunks = items * ceil_div(length, chunk)

    # What a program writes: a gradient, its chunk's sums, or, for sums over the items that cannot
    # be had in the same pass, every term.
    targets = {name: grad for name, grad in grads.items() if kinds[name] == _DIRECT}
    terms = {name: grad for name, grad in grads.items() if kinds[name] == _ROW}
    for name in terms:
        targets[name] = floats(data[0], B, N, C)
    groups = {_ITEM: items, _ALL: 1}
    sums = {name: grad for name, grad in grads.items() if kinds[name] in groups}
    later = {
        kind: [name for name in sums if kinds[name] == kind and chunks > groups[kind]]
        for kind in groups
    }
    slots = later[_ITEM] + later[_ALL]
    partials = floats(data[0], len(slots), chunks, C)
    sums |= {name: partials[slot] for slot, name in enumerate(slots)}

    _, dout, _, h, _, scale, weight, _ = data
    # Whether the rows of a chunk differ in scale.
    scale_rows = scale is not None and (scale.size(1) > 1 or (flat and scale.size(0) > 1))
    written = [targets.get(name) for name in _NAMES[:5]]
    steps = strides_of(*data[:6], *written)
    vec = _launch.vector_width(smallest_itemsize(*data, *written), C, *steps)
    stats = None
    if blocks > 1 and norm != NONE and dout is not None:
        stats = floats(dout, B, N, 4)
        stats_steps = [step // vec for step in strides_of(dout, h, scale)]
        _launch.launch(
            modulate_bwd_stats_kernel, B * N, dout, h, scale, weight, stats, *stats_steps,
            N, C // vec, eps, VEC=vec, NORM=norm, BLOCK_C=_LOOP_C, num_warps=8, **OPTIONS,
        )  # fmt: skip
    _launch.launch(
        modulate_bwd_kernel, chunks * blocks, *data, stats, *written,
        *[sums.get(name) for name in _NAMES[2:]], *[step // vec for step in steps],
        B * N, N, C // vec, chunk, eps,
        VEC=vec, NORM=norm, FLAT=flat, SCALE_ROWS=scale_rows, BLOCK_N=rows, BLOCK_C=block,
        SPLIT=blocks > 1, num_warps=warps, **OPTIONS,
    )  # fmt: skip
    first = 0
    for kind, names in later.items():
        if names:
            part = partials[first : first + len(names)]
            sum_chunks(part, [grads[name] for name in names], chunks // groups[kind])
        first += len(names)
    for name, grad in terms.items():
        column_sums(targets[name].view(1, B, N * C), [grad], B)


def _kind(grad: Tensor, B: int, N: int) -> str:
    """What a gradient is summed over: nothing, an item's rows, all rows, or the items."""
    if grad.dim() == 1:
        return _ALL
    if grad.size(0) == B:
        return _DIRECT if grad.size(1) == N else _ITEM
    return _ALL if grad.size(1) == 1 else _ROW


def _turn(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dim() == 1 else t.transpose(0, 1)
