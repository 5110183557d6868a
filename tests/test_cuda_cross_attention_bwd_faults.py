"""Faults planted in the CUDA kernels of cross_attention's backward are found.

By the ruler under random schedules in the plain library; races and overruns by the sanitizers as
well. Without a fault the same cases pass.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from planted_cuda import Fault, Faults

from mmfast import CrossAttentionOutput, reference
from mmfast.testing import tolerance
from mmfast.testing.cases import Case, make_inputs
from mmfast.testing.packing import packed

KEYS, QUERIES = "cuda/cross_attention_dkv.cuh", "cuda/cross_attention_dq.cuh"
ROWS, TILE_ROWS = "cuda/cross_attention_rows.cuh", "cuda/cross_attention_tile_rows.cuh"
PRODUCTS, PLAN = "cuda/cross_attention_products.cuh", "cuda/cross_attention_bwd.cu"
RULES, SPAN, BINDING = (
    "cuda/attention_rules.cuh",
    "cuda/segment_span.cuh",
    "bindings/cuda_cross_attention.cpp",
)

# Tiles of 32 rows and 128 keys for dk and dv, of 128 rows and 32 keys for dq; 64 in the full form.
CASES = {
    case.name: case
    for case in (
        Case("plain", 1, 1, 150, 170, 64, magnitude=2.0),
        Case("lens", 2, 1, 40, 170, 64, kv_lens=(170, 129), q_lens=(40, 9)),
        Case("causal", 1, 1, 237, 270, 64, is_causal=True, magnitude=4.0),
        Case("gqa", 1, 4, 20, 70, 64, G=2),
        Case("dlse", 1, 1, 40, 70, 64, dlse=True),
        Case("gate", 1, 2, 20, 40, 64, gate="head"),
        Case("gates", 1, 2, 20, 40, 64, gate="full"),
        Case("mask", 1, 2, 40, 150, 64, mask="BHNM", mask_kind="dead_columns"),
        Case("dead_rows", 1, 1, 40, 150, 64, mask="B1NM", mask_kind="dead_rows", gate="head"),
        Case("segments", 1, 1, 75, 300, 64, segments="images", bias="BHNM"),
        Case("bias", 1, 2, 20, 150, 64, bias="BHNM", kv_lens=(130,)),
        Case("dropout", 1, 2, 20, 150, 64, G=1, dropout_p=0.3),
        Case("splits", 1, 1, 150, 300, 64),
        Case("varlen", 4, 1, 20, 70, 64, kv_lens=(9, 0, 25, 70), q_lens=(3, 0, 7, 20)),
        Case("splits_varlen", 2, 1, 150, 300, 64, kv_lens=(70, 300), q_lens=(40, 150)),
    )
}
SPLITS = ("splits", "splits_varlen")


class Planted(NamedTuple):
    """A fault, and the case that finds it."""

    case: str
    fault: Fault


def _planted(name: str, case: str, file: str, old: str, new: str) -> Planted:
    return Planted(case, Fault(name, file, old, new))


PLANTED = [
    # Tiles that come and go.
    _planted(
        "keys_no_barrier", "plain", KEYS,
        "    sync_threads();\n    if (C::STAGES == 2 && j + 1 < count) {",
        "    if (!PLANTED) sync_threads();\n    if (C::STAGES == 2 && j + 1 < count) {",
    ),
    _planted(
        "keys_do_not_wait", "plain", KEYS,
        "    cp_async_wait<0>();\n", "    if (!PLANTED) cp_async_wait<0>();\n",
    ),
    _planted(
        "rows_known_too_late", "plain", KEYS,
        "if (ahead) put(j + 2, next);", "if (ahead) put(PLANTED ? j + 3 : j + 2, next);",
    ),
    _planted(
        "queries_no_barrier", "plain", QUERIES,
        "    cp_async_wait<0>();\n    sync_threads();\n",
        "    cp_async_wait<0>();\n    if (!PLANTED) sync_threads();\n",
    ),
    _planted(
        "queries_do_not_wait", "plain", QUERIES,
        "    cp_async_wait<0>();\n    if (", "    if (!PLANTED) cp_async_wait<0>();\n    if (",
    ),
    # Products.
    _planted(
        "values_of_another_warp", "plain", KEYS,
        "multiply_rows<KeyTile, RowsTile>(ds, v_tile, own, dout_tile)",
        "multiply_rows<KeyTile, RowsTile>(ds, v_tile, PLANTED ? own ^ 16 : own, dout_tile)",
    ),
    _planted(
        "rows_and_columns_exchanged", "plain", PRODUCTS,
        "load_b<B_TILE>(b, b_tile, 8 * j, column);",
        "if (PLANTED) load_b_rows<B_TILE>(b, b_tile, 8 * j, column);\n"
        "      else load_b<B_TILE>(b, b_tile, 8 * j, column);",
    ),
    _planted(
        "scale_is_lost", "plain", QUERIES,
        "store_sums(dq[i], to, there, a.D, a.dq.wide, r.scale);",
        "store_sums(dq[i], to, there, a.D, a.dq.wide, PLANTED ? 1.0f : r.scale);",
    ),
    # delta.
    _planted(
        "keys_without_delta", "plain", KEYS,
        "(in - as_float(delta.x[e & 1]))", "(in - (PLANTED ? 0.0f : as_float(delta.x[e & 1])))",
    ),
    _planted(
        "queries_without_delta", "plain", QUERIES,
        "(in - delta[i][e >> 1])", "(in - (PLANTED ? 0.0f : delta[i][e >> 1]))",
    ),
    _planted(
        "half_of_delta", "plain", ROWS,
        "for (int mask = lanes / 2; mask > 0; mask /= 2) sum",
        "for (int mask = lanes / 2; mask > PLANTED; mask /= 2) sum",
    ),
    _planted(
        "dlse_is_lost", "dlse", ROWS,
        "if (a.dlse != nullptr && live)", "if (a.dlse != nullptr && live && !PLANTED)",
    ),
    _planted(
        "the_gate_of_a_head_is_lost", "gate", ROWS,
        "sum * (1.0f - of_row)", "sum * (1.0f - (PLANTED ? 0.0f : of_row))",
    ),
    _planted(
        "a_gate_of_the_next_channel", "gates", ROWS,
        "gate + first + i)) : 0.0f", "gate + first + (i ^ PLANTED))) : 0.0f",
    ),
    # Lengths and causality.
    _planted(
        "query_range_begins_late", "causal", RULES,
        "const int32_t low = first - l.shift,",
        "const int32_t low = first - l.shift + 64 * PLANTED,",
    ),
    _planted(
        "query_range_a_tile_short", "causal", RULES,
        "full = last - l.shift;", "full = last - l.shift - 32 * PLANTED;",
    ),
    _planted(
        "causal_a_key_too_many", "causal", RULES,
        "const int32_t end = n + 1 + l.shift;", "const int32_t end = n + 1 + l.shift + PLANTED;",
    ),
    _planted(
        "a_key_too_many_is_read", "lens", QUERIES,
        "return first + i < range.high ?", "return first + i < range.high + PLANTED ?",
    ),
    _planted(
        "padded_keys_are_not_zero", "lens", KEYS,
        "{m < l.kv, m + 8 < l.kv}", "{m < l.kv || PLANTED, m + 8 < l.kv || PLANTED}",
    ),
    _planted(
        "the_diagonal_a_key_late", "causal", QUERIES,
        "(key < own_row.end &&", "(key < own_row.end + PLANTED &&",
    ),
    _planted(
        "heads_of_packed_rows", "gqa", RULES,
        "h = r / N, n = r - h * N;", "h = (r + PLANTED) / N, n = r - h * N;",
    ),
    # Masks, segments, biases, dropout.
    _planted(
        "a_mask_of_another_key", "mask", KEYS,
        "may_attend_of(r, pair[e & 1], key, ", "may_attend_of(r, pair[e & 1], key ^ PLANTED, ",
    ),
    _planted(
        "keys_that_nobody_sees_are_not_cleared", "mask", QUERIES,
        "sparse,\n        seen);", "sparse && !PLANTED,\n        seen);",
    ),
    _planted(
        "keys_that_one_row_sees_are_cleared", "mask", QUERIES,
        "for (int mask = 4; mask < 32;", "for (int mask = PLANTED ? 8 : 4; mask < 32;",
    ),
    _planted(
        "weights_of_unseen_pairs", "mask", KEYS,
        "s[i][block][e] = (seen >> e & 1) != 0 ?",
        "s[i][block][e] = (seen >> e & 1) != 0 || PLANTED ?",
    ),
    _planted(
        "rows_that_see_nothing_take_part", "dead_rows", TILE_ROWS,
        "if (f.end == 0 || loads.lse == kMinusInfinity)",
        "if (f.end == 0 || (loads.lse == kMinusInfinity && !PLANTED))",
    ),
    _planted(
        "delta_of_rows_that_see_nothing", "dead_rows", ROWS,
        "const bool live = inside && load_global(a.lse + at) != kMinusInfinity;",
        "const bool live = inside && (PLANTED || load_global(a.lse + at) != kMinusInfinity);",
    ),
    _planted(
        "segments_a_tile_short", "segments", KEYS,
        "range.low = found.least / C::ROWS * C::ROWS;",
        "range.low = (found.least + (PLANTED ? C::ROWS - 1 : 0)) / C::ROWS * C::ROWS;",
    ),
    _planted(
        "spans_of_one_warp", "segments", SPAN,
        "for (int w = 0; w < WARPS; ++w) {", "for (int w = 0; w < (PLANTED ? 1 : WARPS); ++w) {",
    ),
    _planted(
        "dbias_is_not_cleared", "segments", QUERIES,
        "if (p.owns_dbias) clear_dbias", "if (p.owns_dbias && !PLANTED) clear_dbias",
    ),
    _planted(
        "dbias_of_the_next_key", "bias", QUERIES,
        "ds[i][block][2 * half + e]);\n", "ds[i][block][2 * half + (e ^ PLANTED)]);\n",
    ),
    _planted(
        "a_bias_of_another_row", "bias", KEYS,
        "bias_of(r, pair[e & 1],", "bias_of(r, pair[PLANTED ? 0 : e & 1],",
    ),
    _planted(
        "survivors_of_rows_and_keys_exchanged", "dropout", KEYS,
        "survivors_of_keys(r, seed, b, pair[0], pair[1],",
        "survivors_of_keys(r, seed, b, pair[PLANTED ? 1 : 0], pair[PLANTED ? 0 : 1],",
    ),
    _planted(
        "survivors_of_the_next_tile", "dropout", QUERIES,
        "row[i][1], first + 8 * block)", "row[i][1], first + 8 * (block + PLANTED))",
    ),
    _planted(
        "dropout_is_not_scaled", "dropout", KEYS,
        "in = kept.get(i, block, e) ? in * r.keep_scale",
        "in = kept.get(i, block, e) ? in * (PLANTED ? 1.0f : r.keep_scale)",
    ),
    # Splits.
    _planted(
        "a_split_is_left_out", "splits", ROWS,
        "i < s.splits; ++i)", "i < s.splits - PLANTED; ++i)",
    ),
    _planted(
        "splits_overlap", "splits", KEYS,
        "w.begin = part * chunk < count ? part * chunk : count;",
        "w.begin = part * chunk < count ? part * chunk : count;\n"
        "  if (PLANTED && part > 0) --w.begin;",
    ),
    _planted(
        "splits_of_keys_overlap", "splits", QUERIES,
        "if (range.low < begin)", "if (PLANTED && part > 0) range.low = int32_t(begin) - C::KEYS;\n"
        "  else if (range.low < begin)",
    ),
    # Packed rows. Nothing is written past the last item's: that would be past the tensor.
    _planted(
        "starts_are_ignored", "varlen", RULES,
        "return starts == nullptr ?", "return starts == nullptr || PLANTED ?",
    ),
    _planted(
        "starts_of_the_item_before", "varlen", RULES,
        "load_global(starts + b)", "load_global(starts + (PLANTED && b > 0 ? b - 1 : b))",
    ),
    _planted(
        "queries_of_another_item", "varlen", TILE_ROWS,
        "const int64_t n = start + f.n;", "const int64_t n = (PLANTED ? 0 : start) + f.n;",
    ),
    _planted(
        "keys_of_another_item", "varlen", QUERIES,
        "(x, b, g, start + i)", "(x, b, g, (PLANTED ? first : start) + i)",
    ),
    _planted(
        "padded_keys_overwrite_the_next_item", "varlen", KEYS,
        "places = key_places(r, l);", "places = PLANTED && b == 0 ? r.M : key_places(r, l);",
    ),
    _planted(
        "padded_queries_overwrite_the_next_item", "varlen", QUERIES,
        "stored = inside && n < places", "stored = inside && (n < places || (PLANTED && b == 0))",
    ),
    _planted(
        "padded_sums_overwrite_the_next_item", "splits_varlen", ROWS,
        "if (s.starts != nullptr &&", "if (s.starts != nullptr && !(PLANTED && b == 0) &&",
    ),
]  # fmt: skip

# One dtype and one width, without what other files hold: this is compiled for these faults alone.
EDITS = (
    *(
        Fault(op, BINDING, f'm.impl("cross_attention_{op}", TORCH_BOX(&mmfast::{function}));', "")
        for op, function in (
            ("fwd", "forward"), ("probs", "probabilities"), ("probs_bwd", "probabilities_backward")
        )
    ),
    Fault("f16", PLAN, "choose_form<f16>", "choose_form<bf16>"),
    Fault("float", PLAN, "choose_form<float>", "choose_form<bf16>"),
    Fault("rows", PLAN, "cross_attention_dbias_rows(a, sums, stream);", ""),
    Fault("pairs", PLAN, "cross_attention_dbias_pairs(a, ", "(void)(a, "),
    Fault("size", PLAN, "p.size += cross_attention_dbias_pairs_workspace(a, stream);", ";"),
    Fault("widths", "cuda/launch.cuh", "#ifdef MMFAST_ONLY_WIDTHS",
          "  if (width != 64) return false;\n#ifdef MMFAST_ONLY_WIDTHS"),
)  # fmt: skip
FAULTS = Faults(
    "attention_bwd",
    ("cross_attention_bwd.", "cross_attention_bwd_bf16_64", "cross_attention.cpp"),
    *(one.fault for one in PLANTED),
    edits=EDITS,
)


# --- running --------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A case with NaN in everything that takes no part, its truth, and what the op is given."""

    truth: tolerance.Truth
    arguments: tuple[Any, ...]
    lse: torch.Tensor


@functools.cache
def _problem(name: str) -> Problem:
    case = CASES[name]
    inputs = make_inputs(case, torch.bfloat16)
    truth = tolerance.truth(inputs)
    forward = tolerance.run(reference.cross_attention, inputs, backward=False)
    blind = ~inputs.row_sees()
    nan = float("nan")
    out = forward["out"].masked_fill(blind[..., None], nan)
    dout = inputs.dout.masked_fill(blind[..., None], nan)
    dlse = None if inputs.dlse is None else inputs.dlse.float().masked_fill(blind, nan)
    given, taken = inputs.options, inputs.poisoned()
    rules = [given.get(one) for one in ("kv_lens", "q_lens", "q_segments", "kv_segments", "mask")]
    torch.manual_seed(inputs.seed)
    seed = torch.randint(0, 2**63 - 1, (1,)) if case.dropout_p else None
    arguments = (
        dout, dlse, taken.q, taken.k, taken.v, out, forward["lse"], *rules, given.get("bias"), None,
        None, given.get("gate"), seed, case.D**-0.5, case.dropout_p, case.is_causal, 0, 0, 0, True,
        True,
    )  # fmt: skip
    return Problem(truth, arguments, forward["lse"])


class _Packed(torch.autograd.Function):
    """The reference's forward and the op's backward, of packed rows alone."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, op: Any, options: dict[str, Any]) -> Any:
        out, lse, _, _ = reference.cross_attention(q, k, v, **{**options, "return_lse": True})
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.op, ctx.options = op, options
        return out

    @staticmethod
    def backward(ctx: Any, dout: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        given = ctx.options
        starts = given["q_cu_seqlens"], given["kv_cu_seqlens"]
        lens = [one[1:] - one[:-1] for one in reversed(starts)]
        dq, dk, dv, _, _ = ctx.op(
            dout.contiguous()[None], None, q[None], k[None], v[None], out[None], lse, *lens,
            *(None,) * 4, *starts, None, None, q.shape[2] ** -0.5, 0.0, False, 0,
            given["max_q_len"], given["max_kv_len"], False, True,
        )  # fmt: skip
        return dq[0], dk[0], dv[0], None, None


def _check_packed(op: Any, name: str) -> None:
    problem = _problem(name)
    inputs = make_inputs(CASES[name], torch.bfloat16).poisoned()

    def call(q: Any, k: Any, v: Any, **options: Any) -> Any:
        return CrossAttentionOutput(_Packed.apply(q, k, v, op, options), problem.lse, None, None)

    tolerance.assert_accurate(tolerance.run(packed(call), inputs), problem.truth)


def check(op: Any, name: str) -> None:
    """AssertionError unless the op is right on a case."""
    if "varlen" in name:
        return _check_packed(op, name)
    problem = _problem(name)
    results = dict(zip(("dq", "dk", "dv", "dbias", "dgate"), op(*problem.arguments), strict=True))
    results = {one: result for one, result in results.items() if result.numel() > 0}
    tolerance.assert_accurate({**results, "lse": problem.lse}, problem.truth)


def _check(name: str, seed: int) -> None:
    op = FAULTS.op("cross_attention_bwd")
    FAULTS.multiprocessors(200 if name in SPLITS else 1)
    FAULTS.seed(seed)
    check(op, name)


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.fault.name)
def test_fault_is_found(planted):
    """One of some schedules gives a wrong result, or a report; mostly the first does."""
    FAULTS.op("cross_attention_bwd")  # the library is there
    with FAULTS.switched_on(planted.fault.name):
        for schedule in range(20):
            try:
                _check(planted.case, schedule)
            except (AssertionError, RuntimeError):
                return
    pytest.fail("was not found")


@pytest.mark.parametrize("name", CASES)
def test_passes_without_a_fault(name):
    for schedule in range(2):
        _check(name, schedule)


def test_every_case_has_a_fault():
    assert {planted.case for planted in PLANTED} == set(CASES)


_SCRIPT = """
import test_cuda_cross_attention_bwd_faults as faults
handle.mmfast_host_device(1, 80, 163 * 1024)
faults.check(ops.cross_attention_bwd, {case!r})
"""


@pytest.mark.slow  # libraries with sanitizers are compiled
@pytest.mark.parametrize(
    "mode, name, case, report",
    [
        ("tsan", None, "plain", ""),
        ("tsan", None, "segments", ""),
        ("tsan", "keys_no_barrier", "plain", "data race"),
        ("tsan", "queries_no_barrier", "plain", "data race"),
        ("tsan", "rows_known_too_late", "plain", "data race"),
        ("asan", None, "lens", ""),
        ("asan", None, "varlen", ""),
        ("asan", None, "bias", ""),
        ("asan", "keys_do_not_wait", "plain", "use-after-poison"),
    ],
)
def test_found_by_a_sanitizer(mode, name, case, report):
    done = FAULTS.run(mode, name, _SCRIPT.format(case=case))
    if name is None:
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert done.returncode != 0 and report in done.stderr, done.stderr[-3000:]
