"""`cross_attention`, backward: three passes, deterministic, without a score matrix in memory.

1. Rows: delta = rowsum(dout * out) - dLSE, and where there is a gate its gradient and
   dout * sigmoid(gate), which is what the other passes take for dout. The ungated output is not
   needed: rowsum(do * o) = rowsum(dout * out), dgate = dout * out * (1 - sigmoid(gate)).
2. Keys: a program takes a tile of keys and goes over the rows of all heads that share them: dk, dv.
3. Queries: a program takes a tile of rows and goes over their keys: dq, and what of the gradient of
   the bias has one owner for each element, or is a sum over the keys of a row.

Where tiles are too few to fill a device the sum is cut into splits, partial sums in float32, which
are added in order. What else a bias may have is summed in `cross_attention_pairs`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from mmfast.kernels import _tuning
from mmfast.kernels._attention import (
    add_product,
    dropout_keep,
    inner,
    key_range,
    length,
    load_bias,
    load_gate,
    load_keys,
    load_queries,
    load_rows,
    may_attend,
    only,
    row_offset,
    scaled,
    segment_span,
    store_rows,
    tile_rows,
    times,
    zeros,
)
from mmfast.kernels._attention_call import (
    INTEGERS,
    Call,
    Given,
    Sizes,
    common_vec,
    empty_following,
    gate_strides,
    strides_of,
)
from mmfast.kernels._attention_gradients import load_statistics, pair_gradients
from mmfast.kernels._blocks import column_sums
from mmfast.kernels._launch import ceil_div, launch
from mmfast.kernels.cross_attention_pairs import bias_gradient_by_pairs
from torch import Tensor

ROWS = 16
_GREATEST = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=[*INTEGERS, "H", "rows"])
def cross_attention_rows_kernel(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, gate_ptr, delta_ptr, gated_ptr, dgate_ptr,
    dout_b, dout_h, dout_n, out_b, out_h, out_n, dv_b, dv_h, dv_n, gate_b, gate_h, gate_n,
    H, N, rows, FORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta, and where there is a gate dgate (contiguous, like the gate) and the gated dout.

    dv_b ... are the strides of the gated dout. Rows that see nothing give zeros.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    n = row % N
    h = (row // N) % H
    b = row // N // H
    live = tl.load(lse_ptr + row, mask=inside, other=float("-inf")) != float("-inf")
    at = row_offset((dout_b, dout_h, dout_n), b, h, n, 1)
    dout = load_rows(dout_ptr, at, live, FORM.v)
    at = row_offset((out_b, out_h, out_n), b, h, n, FORM.vec)
    out = load_rows(out_ptr, at, live, FORM.v)
    dout = scaled(dout, tl.full([ROWS], 1.0, tl.float32))
    product = times(dout, out)
    delta = tl.sum(product[0], 1)
    if len(product) == 2:
        delta += tl.sum(product[1], 1)
    if gate_ptr is not None:
        weight = load_gate(gate_ptr, (gate_b, gate_h, gate_n), b, h, n, live, FORM)
        at = row_offset((dv_b, dv_h, dv_n), b, h, n, FORM.vec)
        store_rows(gated_ptr, at, inside, times(dout, weight), FORM.v)
        at = (b * N + n) * H + h
        if FORM.gate == 2:
            rest = (1.0 - weight[0],)
            if len(weight) == 2:
                rest = (1.0 - weight[0], 1.0 - weight[1])
            store_rows(dgate_ptr, at * FORM.v.size, inside, times(product, rest), FORM.v)
        else:
            dgate = delta * (1.0 - tl.sum(weight[0], 1))
            tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=live, other=0.0)
    tl.store(delta_ptr + row, delta, mask=inside)


@triton.jit(do_not_specialize=[*INTEGERS, "tiles_m", "splits"])
def cross_attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    dimportance_ptr, dweights_ptr, kv_lens, q_lens, q_segments, kv_segments, mask, bias_ptr, seed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dout_b, dout_h, dout_n,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, threshold, heads, G, N, M,
    scale, natural_scale, keep_scale, weight_factor, tiles_m, splits,
    FORM: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """A program: a tile of keys of (b, g), and a split of the tiles of rows that may see them.

    The score matrix is transposed here, `[keys, rows]`, so that its products need no transposing.
    VALUES: what came in is dout, otherwise gradients of importance and weights, and there is no dv.
    Rows of dk and dv are `splits` apart, one for each split.
    """
    sizes = Sizes(heads, G, N, M)
    given = Given(
        kv_lens, q_lens, q_segments, kv_segments, mask, bias_ptr, (mask_b, mask_h, mask_n),
        (bias_b, bias_h, bias_n), seed, threshold,
    )  # fmt: skip
    pid = tl.program_id(0)
    start = (pid % tiles_m) * FORM.block_m
    part = (pid // tiles_m) % splits
    g = (pid // tiles_m // splits) % G
    b = pid // tiles_m // splits // G
    kv_end = length(kv_lens, b, M)
    q_end = length(q_lens, b, N)
    shift = kv_end - q_end
    key = start + tl.arange(0, FORM.block_m)
    here = key < kv_end
    m = key[:, None]

    low = q_end * 0
    high = tl.where(start < kv_end, q_end, 0)
    if FORM.causal:
        low = tl.minimum(tl.maximum(start - shift, 0), high)
    if kv_segments is not None:
        segment = tl.load(kv_segments + b.to(tl.int64) * M + key, mask=here, other=0)
        smallest = tl.min(tl.where(here, segment, _GREATEST))
        greatest = tl.max(tl.where(here, segment, -_GREATEST - 1))
        if FORM.at_most:
            greatest = tl.maximum(greatest, _GREATEST)
        first, end = segment_span(q_segments + b.to(tl.int64) * N, high, smallest, greatest)
        low = tl.minimum(tl.maximum(low, first), end)
        high = end
    low = low // FORM.block_n * FORM.block_n
    tiles_n = tl.cdiv(high - low, FORM.block_n)
    tiles = heads * tiles_n
    if FORM.packed:
        low = low * 0
        tiles = tl.where(high > 0, tl.cdiv(heads * N, FORM.block_n), 0)
    chunk = tl.cdiv(tiles, splits)

    k_ptr += (b.to(tl.int64) * k_b + g.to(tl.int64) * k_h) * FORM.vec
    k = load_keys(k_ptr, k_n, start, here, FORM.qk, FORM)
    dk = zeros(FORM.block_m, FORM.qk)
    if VALUES:
        v_ptr += (b.to(tl.int64) * v_b + g.to(tl.int64) * v_h) * FORM.vec
        v = load_keys(v_ptr, v_n, start, here, FORM.v, FORM)
        dv = zeros(FORM.block_m, FORM.v)
    for tile in tl.range(part * chunk, tl.minimum((part + 1) * chunk, tiles)):
        head, begin, n, inside = tile_rows(
            tile, tiles_n, low, N, heads, FORM.block_n, FORM.packed
        )  # fmt: skip
        live = inside & (n < q_end)
        if FORM.causal:
            live = live & (n + shift >= 0)
        h = g * heads + head
        q = load_queries(
            q_ptr, (q_b, q_h, q_n), b, h, begin, n, live, FORM.qk, FORM
        )  # fmt: skip
        lse, delta = load_statistics(lse_ptr, delta_ptr, b, h, n, live, sizes)
        if FORM.sparse:
            q = only(q, lse != float("inf"))  # a row that sees nothing may hold anything
        pair_h = h
        keep_h = h
        if FORM.packed:
            pair_h = h[None, :]
            keep_h = h[:, None]
        rows = live[None, :]
        if FORM.causal or FORM.sparse:
            own = n
            if q_segments is not None:
                own = tl.load(q_segments + b.to(tl.int64) * N + n, mask=live, other=0)
            allowed = may_attend(
                b, pair_h, n[None, :], m, rows, kv_end, shift, own[None, :], given, M, False, FORM
            )
        bias = load_bias(b, pair_h, n[None, :], m, rows, kv_end, given, False, FORM)
        p = tl.exp2(inner(k, q, FORM.precision) * scale + bias - lse[None, :])
        if FORM.causal or FORM.sparse:
            p = tl.where(allowed, p, 0.0)
        if VALUES:
            dout = load_queries(
                dout_ptr, (dout_b, dout_h, dout_n), b, h, begin, n, live, FORM.v,
                FORM,
            )  # fmt: skip
            if FORM.sparse:
                dout = only(dout, lse != float("inf"))
            dp = inner(v, dout, FORM.precision)
            dropped = p
            if FORM.dropout:
                keep = tl.trans(dropout_keep(b, keep_h, n, start, given, sizes, FORM))
                dp = tl.where(keep, dp * keep_scale, 0.0)
                dropped = tl.where(keep, p * keep_scale, 0.0)
            dv = add_product(dv, dropped.to(dout[0].dtype), dout, FORM.precision)
        else:
            dp = pair_gradients(
                dimportance_ptr, dweights_ptr, weight_factor, b, pair_h, n[None, :], m, rows,
                m < kv_end, sizes, FORM,
            )  # fmt: skip
        ds = p * (dp - delta[None, :])
        if FORM.causal or FORM.sparse:
            ds = tl.where(allowed, ds, 0.0)
        dk = add_product(dk, ds.to(k[0].dtype), q, FORM.precision)

    exists = key < M
    at = row_offset((dk_b, dk_h, dk_n), b, g, key, FORM.vec) * splits + part * FORM.qk.size
    factor = tl.full([FORM.block_m], 1.0, tl.float32) * natural_scale
    store_rows(dk_ptr, at, exists, only(scaled(dk, factor), here), FORM.qk)
    if VALUES:
        at = row_offset((dv_b, dv_h, dv_n), b, g, key, FORM.vec) * splits + part * FORM.v.size
        store_rows(dv_ptr, at, exists, only(dv, here), FORM.v)


@triton.jit
def _visit(
    state, q, dout, lse, delta, start, end, b, h, n, live, shift, own, k_ptr, v_ptr, k_n, v_n,
    scale, keep_scale, dimportance_ptr, dweights_ptr, weight_factor, dbias_ptr, given, sizes,
    WHOLE: tl.constexpr, VALUES: tl.constexpr, ROW_SUMS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """(dq, row sums of dS) after one more tile of keys. WHOLE: as in the forward."""
    MASKED: tl.constexpr = FORM.sparse or not WHOLE
    dq, sums = state
    key = start + tl.arange(0, FORM.block_m)
    rows, m = n[:, None], key[None, :]
    inside = None
    if not WHOLE:
        inside = key < end
    if MASKED:
        allowed = may_attend(
            b, h, rows, m, live[:, None], end, shift, own, given, sizes.M, WHOLE, FORM
        )  # fmt: skip
    bias = load_bias(b, h, rows, m, live[:, None], end, given, WHOLE, FORM)
    k = load_keys(k_ptr, k_n, start, inside, FORM.qk, FORM)
    p = tl.exp2(inner(q, k, FORM.precision) * scale + bias - lse[:, None])
    if VALUES:
        v = load_keys(v_ptr, v_n, start, inside, FORM.v, FORM)
        dp = inner(dout, v, FORM.precision)
        if FORM.dropout:
            keep = dropout_keep(b, h, n, start, given, sizes, FORM)
            dp = tl.where(keep, dp * keep_scale, 0.0)
    else:
        dp = pair_gradients(
            dimportance_ptr, dweights_ptr, weight_factor, b, h, rows, m, live[:, None], m < end,
            sizes, FORM,
        )  # fmt: skip
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(allowed, ds, 0.0)
    if FORM.sparse:
        k = only(k, tl.max(allowed.to(tl.int32), 0) > 0)
    if dbias_ptr is not None:
        position = (b.to(tl.int64) * sizes.G * sizes.heads + h) * sizes.N + rows
        tl.store(
            dbias_ptr + position * sizes.M + m, ds.to(dbias_ptr.dtype.element_ty),
            mask=live[:, None] & (m < end),
        )  # fmt: skip
    if ROW_SUMS:
        sums += tl.sum(ds, 1)
    return add_product(dq, ds.to(k[0].dtype), k, FORM.precision), sums


@triton.jit(do_not_specialize=[*INTEGERS, "tiles_n", "tiles", "splits", "chunk"])
def cross_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dbias_ptr, sums_ptr,
    dimportance_ptr, dweights_ptr, kv_lens, q_lens, q_segments, kv_segments, mask, bias_ptr, seed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dout_b, dout_h, dout_n, dq_b, dq_h, dq_n,
    mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, threshold, heads, G, N, M,
    scale, natural_scale, keep_scale, weight_factor, tiles_n, tiles, splits, chunk,
    FORM: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """A program: a tile of rows of (b, g), and a split of the keys.

    dbias is `[B, H, N, M]`, zeros before, or None; sums `[splits, B*H*N]`, of dS over the keys of a
    row, or None. Rows of dq are `splits` apart, one for each split. VALUES: as for dk and dv.
    """
    sizes = Sizes(heads, G, N, M)
    given = Given(
        kv_lens, q_lens, q_segments, kv_segments, mask, bias_ptr, (mask_b, mask_h, mask_n),
        (bias_b, bias_h, bias_n), seed, threshold,
    )  # fmt: skip
    pid = tl.program_id(0)
    tile = pid % tiles
    part = (pid // tiles) % splits
    g = (pid // tiles // splits) % G
    b = pid // tiles // splits // G
    if FORM.causal:
        tile = tiles - 1 - tile  # those with the most keys begin first
    head, begin, n, inside = tile_rows(tile, tiles_n, 0, N, heads, FORM.block_n, FORM.packed)
    kv_end = length(kv_lens, b, M)
    q_end = length(q_lens, b, N)
    shift = kv_end - q_end
    live = inside & (n < q_end)
    own = n
    if q_segments is not None:
        own = tl.load(q_segments + b.to(tl.int64) * N + n, mask=live, other=0)
    low, full, high = key_range(b, n, live, shift, kv_end, own, given, M, FORM)
    own = own[:, None]
    low = tl.maximum(low, part * chunk)
    high = tl.minimum(high, (part + 1) * chunk)
    full = tl.maximum(tl.minimum(full, high // FORM.block_m * FORM.block_m), low)

    h = g * heads + head
    pair_h = h
    if FORM.packed:
        pair_h = h[:, None]
    q = load_queries(q_ptr, (q_b, q_h, q_n), b, h, begin, n, live, FORM.qk, FORM)
    lse, delta = load_statistics(lse_ptr, delta_ptr, b, h, n, live, sizes)
    k_ptr += (b.to(tl.int64) * k_b + g.to(tl.int64) * k_h) * FORM.vec
    dout = q
    if VALUES:
        v_ptr += (b.to(tl.int64) * v_b + g.to(tl.int64) * v_h) * FORM.vec
        dout = load_queries(
            dout_ptr, (dout_b, dout_h, dout_n), b, h, begin, n, live, FORM.v, FORM
        )  # fmt: skip
    dq = zeros(FORM.block_n, FORM.qk)
    sums = tl.zeros([FORM.block_n], tl.float32)
    for start in tl.range(low, full, FORM.block_m):
        dq, sums = _visit(
            (dq, sums), q, dout, lse, delta, start, high, b, pair_h, n, live, shift, own,
            k_ptr, v_ptr, k_n, v_n, scale, keep_scale, dimportance_ptr, dweights_ptr,
            weight_factor, dbias_ptr, given, sizes, True, VALUES, sums_ptr is not None, FORM,
        )  # fmt: skip
    for start in tl.range(full, high, FORM.block_m):
        dq, sums = _visit(
            (dq, sums), q, dout, lse, delta, start, high, b, pair_h, n, live, shift, own,
            k_ptr, v_ptr, k_n, v_n, scale, keep_scale, dimportance_ptr, dweights_ptr,
            weight_factor, dbias_ptr, given, sizes, False, VALUES, sums_ptr is not None, FORM,
        )  # fmt: skip

    at = row_offset((dq_b, dq_h, dq_n), b, h, n, FORM.vec) * splits + part * FORM.qk.size
    factor = tl.full([FORM.block_n], 1.0, tl.float32) * natural_scale
    store_rows(dq_ptr, at, inside, scaled(dq, factor), FORM.qk)
    if sums_ptr is not None:
        rows = tl.num_programs(0).to(tl.int64) // tiles // splits * heads * N
        row = (b.to(tl.int64) * G * heads + h) * N + n
        tl.store(sums_ptr + part * rows + row, sums, mask=inside)


class Gradients:
    """The two passes over keys and queries, for what came in for the output or for P."""

    def __init__(
        self,
        call: Call,
        lse: Tensor,
        dout: Tensor | None,
        delta: Tensor | None,
        dimportance: Tensor | None,
        dweights: Tensor | None,
    ) -> None:
        self.call, self.lse, self.dout, self.delta = call, lse, dout, delta
        self.dimportance, self.dweights = dimportance, dweights
        self.factor = 1.0
        weights = 0
        if dweights is not None:
            weights = 1 if dweights.dim() == 3 else 2
            self.factor = 1.0 / call.H if weights == 1 else 1.0
        tensors = [tensor for tensor in (call.q, call.k, call.v, dout) if tensor is not None]
        self.form = call.form._replace(vec=common_vec(*tensors), weights=weights)
        self.strides = self._of(call.q), self._of(call.k), self._of(call.v), self._of(dout)

    def _of(self, tensor: Tensor | None) -> tuple[int, int, int]:
        return (0, 0, 0) if tensor is None else strides_of(tensor, self.form.vec)

    def _factors(self) -> tuple[float, float, float, float]:
        call = self.call
        return call.signed_scale, call.natural_scale, call.keep_scale, self.factor

    def keys(self) -> tuple[Tensor, Tensor]:
        """dk and dv; dv is empty where nothing came in for the output."""
        call = self.call
        q, k, v = call.q, call.k, call.v
        dk = empty_following(k, call.D)
        dv = k.new_empty(0) if v is None else empty_following(v, call.Dv)
        tile = call.tile("dkv")
        packed = call.heads > 1 and tile.rows > call.N
        form = self.form._replace(block_n=tile.rows, block_m=tile.keys, packed=packed)
        tiles = ceil_div(call.M, tile.keys)
        programs = call.B * call.G * tiles
        splits = _tuning.splits(programs, ceil_div(call.heads * call.N, tile.rows))
        results = [dk] if v is None else [dk, dv]
        made = results
        if splits > 1:
            made = [one.new_empty(one.numel() * splits, dtype=torch.float32) for one in results]
        launch(
            cross_attention_dkv_kernel, programs * splits, q, k, v, self.dout, self.lse,
            self.delta, made[0], made[-1] if v is not None else None, self.dimportance,
            self.dweights, *call.given, *self.strides[0], *self.strides[1], *self.strides[2],
            *self.strides[3], *self._of(dk), *(self._of(dv) if v is not None else (0, 0, 0)),
            *call.sizes, *self._factors(), tiles, splits, FORM=form, VALUES=v is not None,
            num_warps=tile.warps, num_stages=tile.stages, **_tuning.OPTIONS,
        )  # fmt: skip
        if splits > 1:
            for one, partial in zip(results, made, strict=True):
                column_sums(partial.view(1, -1, one.shape[3]), [one], splits)
        return dk, dv

    def queries(self, dbias: Tensor | None, row_sums: bool) -> tuple[Tensor, Tensor | None]:
        """dq and, where asked for, the sums of dS over the keys of each row, `[B, H, N]` float32.

        dbias: zeros `[B, H, N, M]` that dS is written to, or None.
        """
        call = self.call
        q, k, v = call.q, call.k, call.v
        dq = empty_following(q, call.D)
        tile = call.tile("dq")
        packed, tiles_n, tiles = call.row_tiles(tile.rows)
        form = self.form._replace(block_n=tile.rows, block_m=tile.keys, packed=packed)
        programs = call.B * call.G * tiles
        splits, chunk = _tuning.key_splits(programs, call.M, tile.keys)
        made, sums = dq, None
        if splits > 1:
            made = dq.new_empty(dq.numel() * splits, dtype=torch.float32)
        if row_sums:
            sums = q.new_empty((splits, *q.shape[:3]), dtype=torch.float32)
        launch(
            cross_attention_dq_kernel, programs * splits, q, k, v, self.dout, self.lse, self.delta,
            made, dbias, sums, self.dimportance, self.dweights, *call.given, *self.strides[0],
            *self.strides[1], *self.strides[2], *self.strides[3], *self._of(dq), *call.sizes,
            *self._factors(), tiles_n, tiles, splits, chunk, FORM=form, VALUES=v is not None,
            num_warps=tile.warps, num_stages=tile.stages, **_tuning.OPTIONS,
        )  # fmt: skip
        if splits > 1:
            column_sums(made.view(1, -1, call.D), [dq], splits)
        return dq, None if sums is None else sums.sum(0)

    def queries_and_bias(self, bias: Tensor | None, row_sums: bool = False) -> tuple[
        Tensor, Tensor, Tensor | None
    ]:  # fmt: skip
        """(dq, dbias or an empty tensor, row sums where asked for)."""
        call = self.call
        if bias is None:
            dq, sums = self.queries(None, row_sums)
            return dq, call.q.new_empty(0), sums
        whole = (call.B, call.H, call.N, call.M)
        if tuple(bias.shape) == whole:
            dbias = torch.zeros(whole, dtype=bias.dtype, device=bias.device)
            dq, sums = self.queries(dbias, row_sums)
        elif bias.shape[3] == call.M:
            dq, sums = self.queries(None, row_sums)
            dbias = bias_gradient_by_pairs(self, bias)
        else:
            dq, sums = self.queries(None, True)
            assert sums is not None
            dbias = sums[..., None].sum_to_size(bias.shape).to(bias.dtype)
        return dq, dbias, sums


def cross_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    segment_rule: int,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(dq, dk, dv, dbias, dgate)`; empty tensors for those that are absent or not needed."""
    call = Call(
        q, k, v, kv_lens, q_lens, q_segments, kv_segments, mask, bias, gate, seed, scale,
        dropout_p, is_causal, segment_rule,
    )  # fmt: skip
    delta = torch.empty_like(lse)
    dgate, gated = q.new_empty(0), None
    if gate is not None:
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        gated = empty_following(q, call.Dv)
    vec = common_vec(out) if gated is None else common_vec(out, gated)
    launch(
        cross_attention_rows_kernel, ceil_div(lse.numel(), ROWS), dout, out, lse, dlse, gate,
        delta, gated, None if gate is None else dgate, *strides_of(dout, 1),
        *strides_of(out, vec), *((0, 0, 0) if gated is None else strides_of(gated, vec)),
        *gate_strides(gate), call.H, call.N, lse.numel(), FORM=call.form._replace(vec=vec),
        ROWS=ROWS, num_warps=4, **_tuning.OPTIONS,
    )  # fmt: skip
    passes = Gradients(call, lse, dout if gated is None else gated, delta, None, None)
    dk, dv = passes.keys()
    dq, dbias, _ = passes.queries_and_bias(bias if need_dbias else None)
    return dq, dk, dv, dbias, dgate
