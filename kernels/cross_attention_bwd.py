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
    first_row,
    length,
    load_gate,
    load_rows,
    row_offset,
    scaled,
    store_rows,
    times,
    written_rows,
)
from mmfast.kernels._attention_call import (
    INTEGERS,
    WIDEST,
    Call,
    common_vec,
    empty_following,
    far,
    gate_strides,
    parts,
    strides_of,
)
from mmfast.kernels._blocks import column_sums
from mmfast.kernels._launch import ceil_div, launch, power_of_two
from mmfast.kernels._packed import clear_outside
from mmfast.kernels.cross_attention_dkv import cross_attention_dkv_kernel
from mmfast.kernels.cross_attention_dq import cross_attention_dq_kernel
from mmfast.kernels.cross_attention_pairs import bias_gradient_by_pairs
from mmfast.kernels.cross_attention_shared_bwd import shared_gradients
from torch import Tensor

ROWS = 16  # of a program, where a row is no wider than WIDEST


@triton.jit(do_not_specialize=[*INTEGERS, "H", "rows"])
def cross_attention_rows_kernel(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, gate_ptr, delta_ptr, gated_ptr, dgate_ptr,
    q_lens, q_starts, dout_b, dout_h, dout_n, out_b, out_h, out_n, dv_b, dv_h, dv_n,
    gate_b, gate_h, gate_n,
    H, N, rows, FORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta, and where there is a gate dgate (contiguous, like the gate) and the gated dout.

    dv_b ... are the strides of the gated dout. Rows that see nothing give zeros.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    n = row % N
    h = (row // N) % H
    b = row // N // H
    place = first_row(q_starts, b) + n
    written = written_rows(q_starts, inside, inside & (n < length(q_lens, b, N)))
    live = tl.load(lse_ptr + row, mask=inside, other=float("-inf")) != float("-inf")
    at = row_offset((dout_b, dout_h, dout_n), b, h, place, 1)
    dout = load_rows(dout_ptr, at, live, FORM.v)
    at = row_offset((out_b, out_h, out_n), b, h, place, FORM.vec)
    out = load_rows(out_ptr, at, live, FORM.v)
    dout = scaled(dout, tl.full([ROWS], 1.0, tl.float32))
    product = times(dout, out)
    delta = tl.sum(product[0], 1)
    if len(product) == 2:
        delta += tl.sum(product[1], 1)
    if gate_ptr is not None:
        weight = load_gate(gate_ptr, (gate_b, gate_h, gate_n), b, h, place, live, FORM)
        at = row_offset((dv_b, dv_h, dv_n), b, h, place, FORM.vec)
        store_rows(gated_ptr, at, written, times(dout, weight), FORM.v)
        at = (b * N + n) * H + h
        if q_starts is not None:
            at = place.to(tl.int64) * H + h
        if FORM.gate == 2:
            rest = (1.0 - weight[0],)
            if len(weight) == 2:
                rest = (1.0 - weight[0], 1.0 - weight[1])
            store_rows(dgate_ptr, at * FORM.v.size, written, times(product, rest), FORM.v)
        else:
            dgate = delta * (1.0 - tl.sum(weight[0], 1))
            tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=written)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=live, other=0.0)
    tl.store(delta_ptr + row, delta, mask=inside)


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
        # Queries in halves cost the passes in 16 bits more than they save: warps repeat products.
        qk = call.form.qk if call.q.element_size() == 4 else parts(call.D, 256)
        self.form = call.form._replace(
            vec=common_vec(*tensors), weights=weights, qk=qk, far=any(map(far, tensors))
        )
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
        for one in results:
            clear_outside(one, call.kv_starts, call.given[0], call.M)
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
            sums = q.new_empty((splits, call.B, call.H, call.N), dtype=torch.float32)
        launch(
            cross_attention_dq_kernel, programs * splits, q, k, v,
            *call.described(form), self.dout, self.lse, self.delta, made, dbias, sums,
            self.dimportance, self.dweights, *call.given, *self.strides[0],
            *self.strides[1], *self.strides[2], *self.strides[3], *self._of(dq), *call.sizes,
            *self._factors(), tiles_n, tiles, splits, chunk, FORM=form, VALUES=v is not None,
            num_warps=tile.warps, num_stages=tile.stages, **_tuning.OPTIONS,
        )  # fmt: skip
        if splits > 1:
            column_sums(made.view(1, -1, call.D), [dq], splits)
        clear_outside(dq, call.q_starts, call.given[1], call.N)
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
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    q_starts: Tensor | None,
    kv_starts: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    segment_rule: int,
    max_q: int,
    max_kv: int,
    need_dbias: bool,
    need_dk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(dq, dk, dv, dbias, dgate)`; empty tensors for those that are absent or not needed.

    `need_dk` counts where the keys are the values.
    """
    shared = v is None and q.shape[3] > WIDEST
    call = Call(
        q, k, k if v is None and not shared else v, kv_lens, q_lens, q_segments, kv_segments,
        mask, bias, q_starts, kv_starts, gate, seed, scale, dropout_p, is_causal, segment_rule,
        max_q, max_kv,
    )  # fmt: skip
    delta = torch.empty_like(lse)
    dgate, gated = q.new_empty(0), None
    if gate is not None:
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        gated = empty_following(q, call.Dv)
    vec = common_vec(out) if gated is None else common_vec(out, gated)
    rows = ROWS if call.Dv <= WIDEST else max(1, ROWS * WIDEST // power_of_two(call.Dv))
    launch(
        cross_attention_rows_kernel, ceil_div(lse.numel(), rows), dout, out, lse, dlse, gate,
        delta, gated, None if gate is None else dgate, q_lens, q_starts, *strides_of(dout, 1),
        *strides_of(out, vec), *((0, 0, 0) if gated is None else strides_of(gated, vec)),
        *gate_strides(gate), call.H, call.N, lse.numel(), FORM=call.form._replace(vec=vec),
        ROWS=rows, num_warps=4, **_tuning.OPTIONS,
    )  # fmt: skip
    if gate is not None:
        logits = dgate[..., None] if gate.dim() == 3 else dgate
        clear_outside(logits.transpose(1, 2), q_starts, q_lens, call.N)
    dout = dout if gated is None else gated
    needed = bias if need_dbias else None
    if shared:
        dq, dk, dbias = shared_gradients(call, lse, dout, delta, needed, need_dk)
        return dq, dk, q.new_empty(0), dbias, dgate
    passes = Gradients(call, lse, dout, delta, None, None)
    dk = dv = q.new_empty(0)
    if v is not None:
        dk, dv = passes.keys()
    elif need_dk:
        dk = torch.add(*passes.keys())
    dq, dbias, _ = passes.queries_and_bias(needed)
    return dq, dk, dv, dbias, dgate
