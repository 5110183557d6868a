"""Faults planted in the CUDA kernels of cross_attention's forward are found.

By the ruler under random schedules in the plain library; those that are races by ThreadSanitizer as
well. Without a fault the same cases pass.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import pytest
import torch
from planted_cuda import Fault, Faults

from mmfast import CrossAttentionOutput
from mmfast.testing import tolerance
from mmfast.testing.cases import Case, make_inputs
from mmfast.testing.packing import packed

KERNEL, FORM = "cuda/cross_attention_fwd.cuh", "cuda/cross_attention_fwd_form.cuh"
SOFTMAX, EPILOGUE = "cuda/cross_attention_fwd_softmax.cuh", "cuda/cross_attention_fwd_epilogue.cuh"
MERGE, PLAN = "cuda/cross_attention_merge.cuh", "cuda/cross_attention_fwd.cu"
RULES, TILE = "cuda/attention_rules.cuh", "cuda/tile.cuh"
OUTSIDE = "cuda/cross_attention_outside.cuh"

# Four tiles of 64 keys and a part of one; rows of two blocks.
CASES = {
    case.name: case
    for case in (
        Case("plain", 1, 1, 70, 270, 64, magnitude=2.0),
        Case("big_scores", 1, 1, 20, 270, 64, magnitude=12.0),
        Case("huge_scores", 1, 1, 20, 270, 64, magnitude=200.0),
        Case("odd", 1, 1, 20, 270, 33, kv_lens=(200,)),
        Case("lens", 3, 1, 20, 320, 64, kv_lens=(320, 129, 0), q_lens=(20, 9, 20)),
        Case("nothing", 2, 1, 20, 150, 64, bias="111M", kv_lens=(150, 0)),
        Case("causal", 1, 1, 150, 270, 64, is_causal=True),
        Case("causal_tall", 1, 1, 270, 150, 64, is_causal=True),
        Case("packed", 1, 4, 20, 150, 64, G=2, is_causal=True),
        Case("mask", 1, 1, 40, 150, 64, mask="BHNM", mask_kind="dead_columns"),
        Case("dead_rows", 1, 1, 40, 150, 64, mask="B1NM", mask_kind="dead_rows"),
        Case("segments", 1, 1, 75, 300, 64, segments="images"),
        Case("at_most", 1, 1, 75, 300, 64, segments="images", segment_rule="at_most"),
        Case("bias", 1, 2, 20, 150, 64, bias="1HNM"),
        Case("gate", 2, 1, 20, 150, 64, gate="full", kv_lens=(150, 0)),
        Case("dropout", 1, 2, 20, 150, 64, G=1, dropout_p=0.3),
        Case("splits", 2, 1, 5, 700, 64, kv_lens=(700, 70), magnitude=3.0),
        Case("splits_gate", 1, 2, 5, 700, 64, gate="head"),
        Case("varlen", 4, 1, 20, 70, 64, kv_lens=(70, 0, 9, 25), q_lens=(3, 0, 7, 20), gate="head"),
        Case("splits_varlen", 2, 1, 5, 700, 64, kv_lens=(90, 700), q_lens=(2, 5)),
    )
}


class Planted(NamedTuple):
    """A fault, the case that finds it, and how: the result that is bad, or a report's word."""

    case: str
    caught: str
    fault: Fault


def _planted(name: str, case: str, caught: str, file: str, old: str, new: str) -> Planted:
    return Planted(case, caught, Fault(name, file, old, new))


PLANTED = [
    # Tiles that come and go.
    _planted(
        "wait_too_loose", "plain", "out", KERNEL,
        "cp_async_wait<F::RING - 2>();\n    sync_threads();\n    issue",
        "if (PLANTED) cp_async_wait<F::RING - 1>(); else cp_async_wait<F::RING - 2>();\n"
        "    sync_threads();\n    issue",
    ),
    _planted(
        "no_barrier_before_a_tile", "plain", "out", KERNEL,
        "    sync_threads();\n    issue<!VALUES>",
        "    if (!PLANTED) sync_threads();\n    issue<!VALUES>",
    ),
    _planted(
        "a_tile_takes_the_place_of_one_in_use", "plain", "out", KERNEL,
        "tiles + (turn + int(VALUES))", "tiles + (PLANTED ? 0 : turn + int(VALUES))",
    ),
    _planted(
        "queries_land_on_results", "nothing", "out", KERNEL,
        "  cp_async_wait<0>();\n  sync_threads();",
        "  if (PLANTED) sync_threads();\n  cp_async_wait<0>();\n  if (!PLANTED) sync_threads();",
    ),
    _planted(
        "results_are_read_before_they_are_staged", "plain", "out", EPILOGUE,
        "  sync_warp();\n  if (!split &&", "  if (!PLANTED) sync_warp();\n  if (!split &&",
    ),
    _planted(
        "keys_past_the_end_are_read", "odd", "out", FORM,
        "return i < left ? first", "return i < left + (PLANTED ? 1 : 0) ? first",
    ),
    _planted(
        "a_tile_too_many_is_whole", "lens", "out", FORM,
        "} else if (left >= TILE::ROWS) {", "} else if (left >= TILE::ROWS - (PLANTED ? 63 : 0)) {",
    ),
    # Products.
    _planted(
        "registers_of_b_swapped", "plain", "out", TILE,
        "mma_m16n8k16<T>(right, a.x, b.x[2], b.x[3]);",
        "mma_m16n8k16<T>(right, a.x, b.x[PLANTED ? 3 : 2], b.x[PLANTED ? 2 : 3]);",
    ),
    _planted(
        "registers_of_a_swapped", "plain", "out", TILE,
        "a.x[1] = pack2<T>(c[0][2], c[0][3]);\n    a.x[2] = pack2<T>(c[1][0], c[1][1]);",
        "a.x[PLANTED ? 2 : 1] = pack2<T>(c[0][2], c[0][3]);\n"
        "    a.x[PLANTED ? 1 : 2] = pack2<T>(c[1][0], c[1][1]);",
    ),
    _planted(
        "values_not_transposed", "plain", "out", TILE,
        "    ldmatrix_x4_trans(b.x, tile + TILE::along(own, row, column / TILE::PER_CHUNK));",
        "    const T* from = tile + TILE::along(own, row, column / TILE::PER_CHUNK);\n"
        "    if (PLANTED) ldmatrix_x4(b.x, from); else ldmatrix_x4_trans(b.x, from);",
    ),
    _planted(
        "another_turn_of_the_chunks", "plain", "overrun", TILE,
        "return (index ^ ((chunks & (TURNED - 1)) * PER_CHUNK)) +",
        "return (PLANTED ? index + (chunks & (TURNED - 1)) * PER_CHUNK\n"
        "                    : index ^ ((chunks & (TURNED - 1)) * PER_CHUNK)) +",
    ),
    # The running softmax.
    _planted(
        "sums_are_not_scaled", "big_scores", "out", SOFTMAX,
        "sums[i][j][2 * half] *= shrink,", "sums[i][j][2 * half] *= PLANTED ? 1.0f : shrink,",
    ),
    _planted(
        "totals_are_not_scaled", "big_scores", "lse", SOFTMAX,
        "state.total[i][half] *= shrink;", "state.total[i][half] *= PLANTED ? 1.0f : shrink;",
    ),
    _planted(
        "a_quarter_of_the_maximum", "big_scores", "out", SOFTMAX,
        "x = fmaxf(x, shuffle_xor(x, 2));", "if (!PLANTED) x = fmaxf(x, shuffle_xor(x, 2));",
    ),
    _planted(
        "a_base_never_grows_again", "huge_scores", "out", SOFTMAX,
        "> state.base[i][half] + kSlack;", "> state.base[i][half] + (PLANTED ? 1e30f : kSlack);",
    ),
    _planted(
        "half_of_the_total", "plain", "lse", EPILOGUE,
        "total += shuffle_xor(total, 2);", "if (!PLANTED) total += shuffle_xor(total, 2);",
    ),
    _planted(
        "some_lanes_vote_alone", "big_scores", "ballot", SOFTMAX,
        "  if (any(exceeds)) {", "  if (PLANTED && exceeds) any(true);\n  if (any(exceeds)) {",
    ),
    # Lengths and causality.
    _planted(
        "a_key_too_many_at_the_end", "lens", "lse", SOFTMAX,
        "if (8 * j + e >= left)", "if (8 * j + e >= left + (PLANTED ? 1 : 0))",
    ),
    _planted(
        "a_key_too_few_at_the_end", "lens", "lse", SOFTMAX,
        "const int32_t left = row_end(a, place.l, inside, n) -",
        "const int32_t left = row_end(a, place.l, inside, n) - PLANTED -",
    ),
    _planted(
        "causal_a_key_too_many", "causal", "lse", RULES,
        "const int32_t end = n + 1 + l.shift;", "const int32_t end = n + 1 + l.shift + PLANTED;",
    ),
    _planted(
        "causal_the_last_tile_is_not_visited", "causal_tall", "lse", RULES,
        "r.high = row_end(a, l, true, last);", "r.high = row_end(a, l, true, last - PLANTED);",
    ),
    _planted(
        "the_diagonal_is_not_cut", "causal", "lse", KERNEL,
        "if (warp_full - start < F::KEYS) cut",
        "if (warp_full - start < F::KEYS - (PLANTED ? 32 : 0)) cut",
    ),
    _planted(
        "heads_of_packed_rows", "packed", "out", RULES,
        "h = r / N, n = r - h * N;", "h = (r + PLANTED) / N, n = r - h * N;",
    ),
    # Masks, segments, bias, gate, dropout.
    _planted(
        "a_mask_of_the_next_key", "mask", "lse", SOFTMAX,
        "!mask_allows(a, rows[e / 2], start + 8 * j + 2 * t + (e & 1)))",
        "!mask_allows(a, rows[e / 2], start + 8 * j + 2 * t + ((e & 1) ^ PLANTED)))",
    ),
    _planted(
        "values_that_nobody_sees_are_not_cleared", "mask", "out", KERNEL,
        "if (F::FULL && sparse) clear_values", "if (F::FULL && sparse && !PLANTED) clear_values",
    ),
    _planted(
        "values_that_one_row_sees_are_cleared", "mask", "out", SOFTMAX,
        "  seen |= shuffle_xor(seen, 8);", "  if (!PLANTED) seen |= shuffle_xor(seen, 8);",
    ),
    _planted(
        "rows_that_see_nothing_are_not_zero", "dead_rows", "out", EPILOGUE,
        "|| total == 0;", "|| (total == 0 && !PLANTED);",
    ),
    _planted(
        "segments_a_tile_short", "segments", "lse", KERNEL,
        "range.low += found.least / F::KEYS * F::KEYS;",
        "range.low += (found.least + (PLANTED ? 63 : 0)) / F::KEYS * F::KEYS;",
    ),
    _planted(
        "below_instead_of_at_most", "at_most", "lse", RULES,
        "a.segments_at_most ? segment <= r.segment",
        "a.segments_at_most ? segment + PLANTED <= r.segment",
    ),
    _planted(
        "a_bias_of_the_row_above", "bias", "out", SOFTMAX,
        "bias_of(a, rows[e / 2], start", "bias_of(a, rows[PLANTED ? 0 : e / 2], start",
    ),
    _planted(
        "logits_of_rows_that_see_nothing_are_read", "gate", "out", EPILOGUE,
        "|| own == kMinusInfinity ||", "|| (own == kMinusInfinity && !PLANTED) ||",
    ),
    _planted(
        "a_gate_of_the_next_channel", "gate", "out", EPILOGUE,
        "gate_of(a.gate, rows.place.b, h, start + n, c)",
        "gate_of(a.gate, rows.place.b, h, start + n, c ^ PLANTED)",
    ),
    _planted(
        "dropout_of_the_next_tile", "dropout", "out", SOFTMAX,
        "rows[0], rows[1], start + 8 * j);", "rows[0], rows[1], start + 8 * (j + PLANTED));",
    ),
    _planted(
        "a_weight_is_not_in_the_total", "dropout", "lse", KERNEL,
        "weigh<F>(s, sums, state, 1.0f);",
        "weigh<F>(s, sums, state, 1.0f);\n"
        "      if (PLANTED) state.total[0][0] -= s[0][0][0];",
    ),
    # Splits.
    _planted(
        "splits_begin_a_tile_late", "splits", "lse", KERNEL,
        "int64_t(place.part) * args.chunk", "int64_t(place.part) * args.chunk + PLANTED * F::KEYS",
    ),
    _planted(
        "splits_are_merged_without_weights", "splits", "out", MERGE,
        "x[e] += weight * as_float", "x[e] += (PLANTED ? 1.0f : weight) * as_float",
    ),
    _planted(
        "a_split_is_left_out", "splits", "lse", MERGE,
        "total += weight;", "total += PLANTED && s == 1 ? 0.0f : weight;",
    ),
    _planted(
        "the_gate_is_lost_in_the_merge", "splits_gate", "out", MERGE,
        "if (a.gate.data != nullptr && !dead", "if (a.gate.data != nullptr && !dead && !PLANTED",
    ),
    # Packed rows. Nothing is written past the last item's: that would be past the tensor.
    _planted(
        "starts_are_ignored", "varlen", "rows of no item", RULES,
        "return starts == nullptr ?", "return starts == nullptr || PLANTED ?",
    ),
    _planted(
        "starts_of_the_item_before", "varlen", "lse", RULES,
        "load_global(starts + b)", "load_global(starts + (PLANTED && b > 0 ? b - 1 : b))",
    ),
    _planted(
        "padding_overwrites_the_next_item", "varlen", "out", EPILOGUE,
        "if (n < places) store_piece", "if (n < places || (PLANTED && place.b == 0)) store_piece",
    ),
    _planted(
        "the_logit_of_another_item", "varlen", "out", EPILOGUE,
        "apply_gate<F>(a, staged, lse, rows, start)",
        "apply_gate<F>(a, staged, lse, rows, PLANTED ? 0 : start)",
    ),
    _planted(
        "the_last_row_is_not_cleared", "varlen", "rows of no item", OUTSIDE,
        "own < p.rows &&", "own < p.rows - PLANTED &&",
    ),
    _planted(
        "what_is_before_the_first_item_is_not_cleared", "varlen", "rows of no item", OUTSIDE,
        "return b >= 0 &&", "return (PLANTED && b < 0) || b >= 0 &&",
    ),
    _planted(
        "merged_padding_overwrites_the_next_item", "splits_varlen", "out", MERGE,
        "if (n < query_places", "if ((PLANTED && b == 0) || n < query_places",
    ),
]  # fmt: skip

# One dtype and one width, without what other files hold: this is compiled for these faults alone.
_BINDING = "bindings/cuda_cross_attention.cpp"
EDITS = (
    *(
        Fault(op, _BINDING, f'm.impl("cross_attention_{op}", TORCH_BOX(&mmfast::{function}));', "")
        for op, function in (
            ("bwd", "backward"), ("probs", "probabilities"), ("probs_bwd", "probabilities_backward")
        )
    ),
    *(
        Fault(f"{form}_{dtype}", PLAN, f"cross_attention_fwd_{form}<{dtype}>",
              f"cross_attention_fwd_{form}<bf16>")
        for form in ("plain", "full")
        for dtype in ("f16", "float")
    ),
    Fault("widths", "cuda/launch.cuh", "#ifdef MMFAST_ONLY_WIDTHS",
          "  if (width != 64) return false;\n#ifdef MMFAST_ONLY_WIDTHS"),
)  # fmt: skip
FAULTS = Faults(
    "attention",
    ("cross_attention_fwd.", "cross_attention_fwd_bf16", "cross_attention_fwd_full_bf16",
     "cross_attention.cpp"),
    *(one.fault for one in PLANTED),
    edits=EDITS,
)  # fmt: skip


RULES_OF_A_CALL = ("kv_lens", "q_lens", "q_segments", "kv_segments", "mask", "bias")


@functools.cache
def _truth(name: str) -> tolerance.Truth:
    return tolerance.truth(make_inputs(CASES[name], torch.bfloat16), backward=False)


def run(op: Any, name: str) -> tolerance.Results:
    """The op itself on a case, with NaN in everything that takes no part."""
    case, inputs = CASES[name], _truth(name).inputs.poisoned()
    given = dict(inputs.options)
    if "gate" in given:
        given["gate"] = given["gate"].clone()
        given["gate"][~inputs.row_sees().transpose(1, 2)] = float("nan")
    torch.manual_seed(inputs.seed)
    seed = torch.randint(0, 2**63 - 1, (1,)) if case.dropout_p else None

    def call(q: Any, k: Any, v: Any, **options: Any) -> CrossAttentionOutput:
        rules = [options.get(one) for one in RULES_OF_A_CALL]
        starts = [options.get(one) for one in ("q_cu_seqlens", "kv_cu_seqlens")]
        if "varlen" in name:
            rules[:2] = [(one[1:] - one[:-1]) for one in reversed(starts)]
            q, k, v = q[None], k[None], v[None]
        gate = options.get("gate")
        gate = gate[None] if "varlen" in name and gate is not None else gate
        out, lse = op(
            q, k, v, *rules, *starts, gate, seed, case.D**-0.5, case.dropout_p, case.is_causal,
            int(case.segment_rule == "at_most"), options.get("max_q_len", 0),
            options.get("max_kv_len", 0),
        )  # fmt: skip
        return CrossAttentionOutput(out[0] if "varlen" in name else out, lse, None, None)

    function = packed(call) if "varlen" in name else call
    results = function(inputs.q, inputs.k, inputs.v, **given)
    return {"out": results.out, "lse": results.lse}


def _check(name: str, schedule: int) -> None:
    """The case in the plain library, by the ruler, on a device that it fills or not."""
    op = FAULTS.op("cross_attention_fwd")
    FAULTS.seed(schedule)
    FAULTS._library().mmfast_host_device(400 if name.startswith("splits") else 1, 80, 99 * 1024)
    tolerance.assert_accurate(run(op, name), _truth(name))


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.fault.name)
def test_fault_is_found(planted):
    """One of some schedules gives a wrong result, or a report; mostly the first does."""
    wanted = planted.caught
    wanted = rf"(?m)^BAD {wanted}:" if wanted in ("out", "lse") else wanted
    reports = []
    FAULTS.op("cross_attention_fwd")  # the library is there
    with FAULTS.switched_on(planted.fault.name):
        for schedule in range(60):
            try:
                _check(planted.case, schedule)
            except (AssertionError, RuntimeError) as report:
                reports.append(str(report))
                if re.search(wanted, reports[-1]):
                    return
    pytest.fail(f"was not found as {wanted}; " + "\n".join(reports[:2]))


@pytest.mark.parametrize("name", CASES)
def test_passes_without_a_fault(name):
    for schedule in range(4):
        _check(name, schedule)


def test_every_case_has_a_fault():
    assert {planted.case for planted in PLANTED} == set(CASES)


_RACE = """
import test_cuda_cross_attention_faults
test_cuda_cross_attention_faults.run(ops.cross_attention_fwd, "plain")
"""


@pytest.mark.slow  # a library with a sanitizer is compiled
@pytest.mark.parametrize(
    "name",
    [
        None,
        "no_barrier_before_a_tile",
        "a_tile_takes_the_place_of_one_in_use",
        "results_are_read_before_they_are_staged",
    ],
)
def test_a_race_is_found_by_thread_sanitizer(name):
    done = FAULTS.run("tsan", name, _RACE)
    if name is None:
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert "ThreadSanitizer: data race" in done.stderr, done.stderr[-3000:]
