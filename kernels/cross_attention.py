"""`cross_attention`, forward: sigmoid(gate) * (dropout(softmax(scale q k^T + bias)) @ v), and LSE.

A program takes a tile of query rows of one key head and goes over the tiles of its keys with a
running maximum and sum (Milakov & Gimelshein 2018; Dao et al. 2022). Tiles that lengths, causality
or segments rule out are not visited; those in which every row sees every key take a path without
masks. Where rows are too few to fill a device the keys are cut into splits, whose normalised
results a second kernel merges by their LSE, in the order of the splits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from mmfast.kernels import _tuning
from mmfast.kernels._attention import (
    LN2,
    add_product,
    dropout_keep,
    first_row,
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
    plus,
    row_offset,
    scaled,
    store_rows,
    tile_rows,
    times,
    written_rows,
    zeros,
)
from mmfast.kernels._attention_call import (
    INTEGERS,
    MOST_PLANS,
    WIDEST,
    Call,
    Form,
    Given,
    Sizes,
    common_vec,
    describe,
    empty_following,
    gate_strides,
    plan_key,
    strides_of,
)
from mmfast.kernels._launch import ceil_div, launch
from mmfast.kernels._packed import clear_outside
from mmfast.kernels.cross_attention_shared import cross_attention_shared_fwd
from torch import Tensor


@triton.jit
def _visit(
    state, q, start, end, b, g, h, n, live, shift, own, place, k_ptr, v_ptr,
    k_described, v_described, k_n, v_n, scale, given, sizes,
    WHOLE: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """(sums, total, top) after one more tile of keys. WHOLE: none of them is past the end, and
    unless FORM.sparse every row sees all of them. place: item and first row of the tensor.

    What tells pairs apart is loaded before the product, whose layout it then takes. The maximum is
    taken of what is multiplied by a scale that is not negative: see Form.negative.
    """
    MASKED: tl.constexpr = FORM.sparse or not WHOLE
    sums, total, top = state
    key = start + tl.arange(0, FORM.block_m)
    rows, m = n[:, None], key[None, :]
    live = live[:, None]
    inside = None
    if not WHOLE:
        inside = key < end
    if MASKED:
        allowed = may_attend(b, h, rows, m, live, end, shift, own, given, sizes.M, WHOLE, FORM)
    bias = load_bias(b, h, rows, m, live, end, given, WHOLE, FORM)
    item, first = place
    k = load_keys(k_ptr, k_described, item, g, k_n, first + start, inside, FORM.qk, FORM)
    scores = inner(q, k, FORM.precision)
    if FORM.negative:
        scores = -scores
    if MASKED or given.bias is not None:
        scores = scores * scale + bias
        if MASKED:
            scores = tl.where(allowed, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - base[:, None])
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    if FORM.dropout:
        keep = dropout_keep(b, h, n, start, given, sizes, FORM)
        p = tl.where(keep, p, 0.0)
    v = load_keys(v_ptr, v_described, item, g, v_n, first + start, inside, FORM.v, FORM)
    if FORM.sparse:
        v = only(v, tl.max(allowed.to(tl.int32), 0) > 0)
    sums = add_product(scaled(sums, shrink), p.to(v[0].dtype), v, FORM.precision)
    return sums, total, new_top


@triton.jit(do_not_specialize=[*INTEGERS, "tiles_n", "tiles", "splits", "chunk"])
def cross_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_described, v_described, out_ptr, lse_ptr, gate_ptr,
    kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts, seed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n, gate_b, gate_h, gate_n,
    mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, threshold, heads, G, N, M,
    scale, keep_scale, tiles_n, tiles, splits, chunk,
    FORM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A program: a tile of rows of (b, g), and a split of the keys.

    SPLIT: out is `[splits, B*H*N, DV]` float32 and lse `[splits, B*H*N]` in units of log 2, which
    `cross_attention_merge_kernel` takes; every split writes its rows. Otherwise the results.
    """
    sizes = Sizes(heads, G, N, M)
    given = Given(
        kv_lens, q_lens, q_segments, kv_segments, mask, bias, (mask_b, mask_h, mask_n),
        (bias_b, bias_h, bias_n), seed, threshold,
    )  # fmt: skip
    pid = tl.program_id(0)
    tile = pid % tiles
    part = (pid // tiles) % splits
    g = (pid // tiles // splits) % sizes.G
    b = pid // tiles // splits // sizes.G
    if FORM.causal:
        tile = tiles - 1 - tile  # those with the most keys begin first
    head, begin, n, inside = tile_rows(
        tile, tiles_n, 0, sizes.N, sizes.heads, FORM.block_n, FORM.packed
    )  # fmt: skip
    kv_end = length(given.kv_lens, b, sizes.M)
    q_end = length(given.q_lens, b, sizes.N)
    shift = kv_end - q_end
    live = inside & (n < q_end)
    own = n
    if given.q_segments is not None:
        own = tl.load(given.q_segments + b.to(tl.int64) * sizes.N + n, mask=live, other=0)
    low, full, high = key_range(b, n, live, shift, kv_end, own, given, sizes.M, FORM)
    own = own[:, None]
    if SPLIT:
        low = tl.maximum(low, part * chunk)
        high = tl.minimum(high, (part + 1) * chunk)
        full = tl.maximum(tl.minimum(full, high // FORM.block_m * FORM.block_m), low)

    h = g * sizes.heads + head
    pair_h = h
    if FORM.packed:
        pair_h = h[:, None]
    row_of_item = first_row(q_starts, b)
    q = load_queries(
        q_ptr, (q_b, q_h, q_n), b, h, row_of_item, begin, n, live, FORM.qk, FORM
    )  # fmt: skip
    place = (b, first_row(kv_starts, b))
    if kv_starts is not None:
        place = (b * 0, place[1])
    k_ptr += (b.to(tl.int64) * k_b + g.to(tl.int64) * k_h) * FORM.vec
    v_ptr += (b.to(tl.int64) * v_b + g.to(tl.int64) * v_h) * FORM.vec
    sums = zeros(FORM.block_n, FORM.v)
    total = tl.zeros([FORM.block_n], tl.float32)
    top = tl.full([FORM.block_n], float("-inf"), tl.float32)
    for start in tl.range(low, full, FORM.block_m):
        sums, total, top = _visit(
            (sums, total, top), q, start, high, b, g, pair_h, n, live, shift, own, place,
            k_ptr, v_ptr, k_described, v_described, k_n, v_n, scale, given, sizes, True, FORM,
        )  # fmt: skip
    for start in tl.range(full, high, FORM.block_m):
        sums, total, top = _visit(
            (sums, total, top), q, start, high, b, g, pair_h, n, live, shift, own, place,
            k_ptr, v_ptr, k_described, v_described, k_n, v_n, scale, given, sizes, False, FORM,
        )  # fmt: skip

    dead = (total == 0.0) | (live == 0)
    factor = tl.where(dead, 0.0, 1.0 / total)
    lse = tl.where(dead, float("-inf"), top + tl.log2(total))
    out = only(scaled(sums, factor * keep_scale), dead == 0)
    row = ((b * sizes.G + g) * sizes.heads + head).to(tl.int64) * sizes.N + n
    if SPLIT:
        rows = tl.num_programs(0).to(tl.int64) // tiles // splits * sizes.heads * sizes.N
        row += part * rows
        store_rows(out_ptr, row * FORM.v.size, inside, out, FORM.v)
        tl.store(lse_ptr + row, lse, mask=inside)
    else:
        if gate_ptr is not None:
            weight = load_gate(
                gate_ptr, (gate_b, gate_h, gate_n), b, h, row_of_item + n, inside & (dead == 0),
                FORM,
            )  # fmt: skip
            out = times(out, weight)
        at = row_offset((out_b, out_h, out_n), b, h, row_of_item + n, FORM.vec)
        store_rows(out_ptr, at, written_rows(q_starts, inside, live), out, FORM.v)
        tl.store(lse_ptr + row, lse * LN2, mask=inside)


@triton.jit(do_not_specialize=[*INTEGERS, "H", "rows", "splits"])
def cross_attention_merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, gate_ptr, q_lens, q_starts, out_b, out_h, out_n,
    gate_b, gate_h, gate_n, H, N, rows, splits,
    FORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = sum of part_s * 2^(lse_s - lse), lse = log2 of the sum of 2^lse_s, in order of splits.

    A split without a key has LSE -inf and parts of 0.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for part in tl.range(0, splits):
        lse = tl.load(part_lse_ptr + part * rows + row, mask=inside, other=float("-inf"))
        top = tl.maximum(top, lse)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([ROWS], tl.float32)
    out = zeros(ROWS, FORM.v)
    for part in tl.range(0, splits):
        at = part * rows + row
        weight = tl.exp2(tl.load(part_lse_ptr + at, mask=inside, other=float("-inf")) - base)
        total += weight
        piece = load_rows(part_ptr, at * FORM.v.size, inside, FORM.v)
        out = plus(out, scaled(piece, weight))
    dead = total == 0.0
    out = only(scaled(out, tl.where(dead, 0.0, 1.0 / total)), dead == 0)
    n = row % N
    h = (row // N) % H
    b = row // N // H
    place = first_row(q_starts, b) + n
    if gate_ptr is not None:
        weight = load_gate(
            gate_ptr, (gate_b, gate_h, gate_n), b, h, place, inside & (dead == 0), FORM
        )
        out = times(out, weight)
    written = written_rows(q_starts, inside, inside & (n < length(q_lens, b, N)))
    at = row_offset((out_b, out_h, out_n), b, h, place, FORM.vec)
    store_rows(out_ptr, at, written, out, FORM.v)
    lse = tl.where(dead, float("-inf"), base + tl.log2(total))
    tl.store(lse_ptr + row, lse * LN2, mask=inside)


MERGE_ROWS = 16


def cross_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of `mmfast.cross_attention`, whose checks have been made."""
    if v is None and q.shape[3] > WIDEST:
        return cross_attention_shared_fwd(
            q, k, kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts, gate,
            seed, scale, dropout_p, is_causal, segment_rule, max_q, max_kv,
        )  # fmt: skip
    v = k if v is None else v
    given = kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts
    rest = gate, seed, scale, dropout_p, is_causal, segment_rule, max_q, max_kv
    key = plan_key(q, k, v, *given, *rest)
    plan = None if key is None else _plans.get(key)
    if plan is None:
        plan = _make_plan(Call(q, k, v, *given, *rest))
        if key is not None:
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            _plans[key] = plan
    rows, splits = plan.rows, plan.splits
    out = empty_following(q, plan.DV)
    lse = torch.empty(plan.statistics, dtype=torch.float32, device=q.device)
    clear_outside(out, q_starts, q_lens, lse.shape[2])
    if rows == 0:
        return out, lse
    results = out, lse
    if splits > 1:
        results = (
            torch.empty((splits, rows, plan.DV), dtype=torch.float32, device=q.device),
            torch.empty((splits, rows), dtype=torch.float32, device=q.device),
        )
    k_described = describe(k, plan.keys, plan.form.qk) if plan.described else None
    v_described = describe(v, plan.keys, plan.form.v) if plan.described else None
    launch(
        cross_attention_fwd_kernel, plan.programs, q, k, v, k_described, v_described, *results,
        gate if splits == 1 else None, *given, seed, *plan.arguments, **plan.constants,
    )  # fmt: skip
    if splits > 1:
        launch(
            cross_attention_merge_kernel, ceil_div(rows, MERGE_ROWS), *results, out, lse, gate,
            q_lens, q_starts, *plan.merge, FORM=plan.form, ROWS=MERGE_ROWS, num_warps=4,
            **_tuning.OPTIONS,
        )  # fmt: skip
    return out, lse


class _Plan(NamedTuple):
    """A launch but for its tensors."""

    rows: int
    statistics: tuple[int, int, int]
    splits: int
    programs: int
    keys: int
    described: bool
    DV: int
    form: Form
    arguments: tuple[Any, ...]
    merge: tuple[Any, ...]
    constants: dict[str, Any]


_plans: dict[tuple[Any, ...], _Plan] = {}


def _make_plan(call: Call) -> _Plan:
    q, k, v = call.q, call.k, call.v
    assert v is not None
    out = empty_following(q, call.Dv)
    tile = call.tile("fwd")
    packed, tiles_n, tiles = call.row_tiles(tile.rows)
    vec = common_vec(q, k, v, out)
    form = call.form._replace(vec=vec, block_n=tile.rows, block_m=tile.keys, packed=packed)
    groups = call.B * call.G * tiles
    splits, chunk = _tuning.key_splits(groups, call.M, tile.keys)
    gated = gate_strides(call.gate)
    rows = call.B * call.H * call.N
    return _Plan(
        rows, (call.B, call.H, call.N), splits, groups * splits, tile.keys,
        call.wants_descriptors(), call.Dv, form,
        (*strides_of(q, vec), *strides_of(k, vec), *strides_of(v, vec), *strides_of(out, vec),
         *gated, *call.sizes, call.scale, call.keep_scale, tiles_n, tiles, splits, chunk),
        (*strides_of(out, vec), *gated, call.H, call.N, rows, splits),
        {"FORM": form, "SPLIT": splits > 1, "num_warps": tile.warps, "num_stages": tile.stages,
         **_tuning.OPTIONS},
    )  # fmt: skip
