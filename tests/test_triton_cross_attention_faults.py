"""Faults planted in the attention kernels are found by the ruler or by the guard.

A fault is a piece of source with another in its place. Its case has to fail, in the result that is
named or by the error that is named; the same cases pass without a fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from planted_faults import Edit, planted
from triton_helpers import (
    OutOfBoundsError,
    RaceError,
    interpreted,  # noqa: F401
    requires_triton,
)

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import Case, make_inputs

pytestmark = [requires_triton, pytest.mark.usefixtures("interpreted")]

# The interpreter's tiles: 64 rows and 32 keys (forward, dq), 32 rows and 64 keys (dk and dv, sums
# over pairs). Four tiles or more are cut into splits.
CASES = {
    case.name: case
    for case in (
        Case("plain", 1, 1, 70, 70, 16),
        Case("widths", 1, 2, 5, 37, 16, Dv=40),
        Case("two_parts", 1, 1, 5, 37, 40),
        Case("descriptors", 1, 2, 5, 70, 128),
        Case("lens", 2, 1, 5, 70, 16, kv_lens=(70, 33)),
        Case("big_scores", 1, 1, 5, 70, 16, magnitude=9.0),
        Case("scale_negative", 1, 1, 5, 37, 16, scale=-0.3),
        Case("splits", 1, 1, 5, 150, 16),
        Case("splits_gate", 1, 1, 5, 150, 16, gate="head"),
        Case("splits_dead", 2, 1, 5, 150, 16, kv_lens=(150, 0)),
        Case("row_splits", 1, 1, 150, 20, 16),
        Case("gqa", 1, 4, 5, 20, 16, G=2),
        Case("gqa_rows", 1, 4, 70, 20, 16, G=2),
        Case("causal", 1, 1, 40, 70, 16, is_causal=True),
        Case("causal_square", 1, 1, 70, 70, 16, is_causal=True),
        Case("causal_tall", 1, 1, 70, 20, 16, is_causal=True),
        Case("segments", 1, 1, 75, 140, 16, segments="images"),
        Case("segments_at_most", 1, 1, 40, 70, 16, segments="images", segment_rule="at_most"),
        Case("mask", 1, 1, 40, 70, 16, mask="BHNM", mask_kind="dead_columns"),
        Case("mask_dead_rows", 1, 1, 40, 20, 16, mask="B1NM", mask_kind="dead_rows"),
        Case("dropout", 1, 2, 5, 70, 16, dropout_p=0.3),
        Case("dropout_packed", 1, 2, 5, 20, 16, G=1, dropout_p=0.3),
        Case("dropout_gate", 1, 1, 5, 20, 16, dropout_p=0.3, gate="full"),
        Case("dlse", 1, 1, 5, 20, 16, dlse=True),
        Case("bias_items", 3, 1, 5, 20, 16, bias="1HNM"),
        Case("bias_infinite", 1, 1, 5, 20, 16, bias="BHNM", bias_kind="infinite"),
        Case("bias_heads", 1, 2, 5, 20, 16, bias="1H1M"),
        Case("bias_rows", 1, 1, 5, 37, 16, bias="11N1"),
        Case("importance", 2, 1, 5, 20, 16, importance=True, q_lens=(5, 2)),
        Case("weights", 1, 3, 5, 20, 16, weights="mean"),
    )
}


class Fault(NamedTuple):
    """`caught`: the result that the ruler calls bad, or the guard's error."""

    name: str
    case: str
    caught: str | type[Exception]
    edits: tuple[Edit, ...]


def _fault(
    name: str, case: str, caught: str | type[Exception], where: tuple[str, str], old: str, new: str
) -> Fault:
    return Fault(name, case, caught, (Edit(*where, old, new),))


_FORWARD, _BACKWARD = "cross_attention.py", "cross_attention_bwd.py"
_KEYS, _QUERIES = "cross_attention_dkv.py", "cross_attention_dq.py"
_COMMON, _GRADIENTS = "_attention.py", "_attention_gradients.py"
_PAIRS = "cross_attention_pairs.py"
VISIT, FWD = (_FORWARD, "_visit"), (_FORWARD, "cross_attention_fwd_kernel")
MERGE, PLAN = (_FORWARD, "cross_attention_merge_kernel"), (_FORWARD, "_make_plan")
ROWS, DKV = (_BACKWARD, "cross_attention_rows_kernel"), (_KEYS, "cross_attention_dkv_kernel")
VISIT_DQ, DQ = (_QUERIES, "_visit"), (_QUERIES, "cross_attention_dq_kernel")
PASSES, PAIRS = (_BACKWARD, "Gradients"), (_PAIRS, "cross_attention_pairs_kernel")
STATISTICS = (_GRADIENTS, "load_statistics")
MAY_ATTEND, KEY_RANGE = (_COMMON, "may_attend"), (_COMMON, "key_range")
DROPOUT = (_COMMON, "dropout_keep")
LOAD_KEYS = (_COMMON, "load_keys")
BY_DESCRIPTOR = Edit("_tuning.py", "wants_descriptors", "return False", "return True")
EACH_ITS_OWN = 'tl.where(lse == float("-inf"), float("inf"), lse)'

FAULTS = [
    # Tails.
    _fault(
        "scores of the last key tile without a mask", "lens", "out", VISIT,
        'tl.where(allowed, scores, float("-inf"))', "scores",
    ),
    _fault(
        "load of the last key tile without a mask", "plain", OutOfBoundsError, VISIT,
        "inside = key < end", "inside = key >= 0",
    ),
    _fault(
        "dS of the last key tile without a mask", "bias_rows", "dbias", VISIT_DQ,
        "ds = tl.where(allowed, ds, 0.0)", "ds = ds",
    ),
    _fault(
        "load of the last rows without a mask", "plain", OutOfBoundsError,
        (_COMMON, "load_queries"),
        "i * strides[2] * FORM.vec, rows,", "i * strides[2] * FORM.vec, None,",
    ),
    _fault(
        "store of the last rows without a mask", "plain", OutOfBoundsError,
        (_COMMON, "_store_part"), " mask = rows[:, None]", " mask = rows[:, None] == rows[:, None]",
    ),
    _fault(
        "the padding of a width is read", "two_parts", OutOfBoundsError, (_COMMON, "_load_part"),
        "mask = d < ", "mask = d <= ",
    ),
    _fault(
        "the second part of a width is left out of the scores", "two_parts", "out",
        (_COMMON, "inner"), "if len(a) == 2:", "if len(a) == 3:",
    ),
    # Strides, heads, items.
    _fault(
        "strides of K and V swapped, forward", "widths", OutOfBoundsError, PLAN,
        "*strides_of(k, vec), *strides_of(v, vec),", "*strides_of(v, vec), *strides_of(k, vec),",
    ),
    _fault(
        "strides of K and V swapped, backward", "widths", OutOfBoundsError, PASSES,
        "self._of(call.k), self._of(call.v)", "self._of(call.v), self._of(call.k)",
    ),
    _fault(
        "dk and dv summed over the wrong group", "gqa_rows", "dk", DKV,
        "h = g * heads + head", "h = head * G + g",
    ),
    _fault(
        "dk and dv summed over the wrong group, rows packed", "gqa", "dv", DKV,
        "h = g * heads + head", "h = head * G + g",
    ),
    _fault(
        "the bias of the first head for all", "bias_heads", "out", (_COMMON, "load_pairs"),
        "offset += h.to(tl.int64) * strides[1]", "offset += h.to(tl.int64) * 0",
    ),
    _fault(
        "dbias of a broadcast bias forgets an item", "bias_items", "dbias", PAIRS,
        "tl.range(0, loop_b * ", "tl.range(0, (loop_b - 1) * ",
    ),
    Fault(
        "keys by descriptor: those of the first head for all", "descriptors", "out",
        (BY_DESCRIPTOR, Edit(*LOAD_KEYS, "load([b, g, start, 0])", "load([b, g * 0, start, 0])")),
    ),
    Fault(
        "keys by descriptor: the first half of a width twice", "descriptors", "out",
        (
            BY_DESCRIPTOR,
            Edit(*LOAD_KEYS, "load([b, g, start, WIDTH.first])", "load([b, g, start, 0])"),
        ),
    ),
    # Softmax and its statistics.
    _fault(
        "LSE without the last key", "plain", "lse", VISIT,
        "tl.sum(p, 1)", "tl.sum(tl.where(m < sizes.M - 1, p, 0.0), 1)",
    ),
    _fault(
        "LSE with a key too many", "plain", "lse", FWD,
        "tl.log2(total)", "tl.log2(total * (1.0 + 1.0 / sizes.M))",
    ),
    _fault(
        "sums kept as they are when the maximum grows", "big_scores", "out", VISIT,
        "scaled(sums, shrink)", "scaled(sums, 0.0 * shrink + 1.0)",
    ),
    _fault(
        "a maximum of -inf is subtracted", "segments", "out", VISIT,
        "shrink = tl.exp2(top - base)", "shrink = tl.exp2(top - new_top)",
    ),
    _fault(
        "the sign of a negative scale lost", "scale_negative", "out", VISIT,
        "scores = -scores", "scores = scores * 1.0",
    ),
    _fault("P of rows that see nothing", "bias_infinite", "dv", STATISTICS, EACH_ITS_OWN, "lse"),
    # Splits.
    _fault(
        "splits merged without rescaling", "splits", "out", MERGE,
        'other=float("-inf")) - base)', 'other=float("-inf")) * 0.0)',
    ),
    _fault(
        "splits merged with a maximum of -inf", "splits_dead", "out", MERGE,
        'base = tl.where(top == float("-inf"), 0.0, top)', "base = top",
    ),
    _fault(
        "the gate is lost in the merge", "splits_gate", "out", MERGE, "times(out, weight)", "out",
    ),
    _fault(
        "the merge does not divide by its sum", "splits_gate", "out", MERGE,
        "1.0 / total", "1.0 + 0.0 * total",
    ),
    _fault(
        "all splits write the rows of the first", "splits", RaceError, FWD,
        "row += part * rows", "row += 0 * rows",
    ),
    _fault(
        "a split of the rows leaves out its last tile", "row_splits", "dk", DKV,
        "chunk = tl.cdiv(tiles, splits)", "chunk = tiles // splits",
    ),
    _fault(
        "a split of the keys begins a tile late", "splits", "dq", DQ,
        "tl.maximum(low, part * chunk)", "tl.maximum(low, part * chunk + FORM.block_m)",
    ),
    # Gradients.
    _fault("dq without the scale", "plain", "dq", DQ, "* natural_scale", "* 1.0"),
    _fault("dk without the scale", "plain", "dk", DKV, "* natural_scale", "* 1.0"),
    _fault(
        "delta without the gradient of the LSE", "dlse", "dq", ROWS,
        "if dlse_ptr is not None:", "if dlse_ptr is None:",
    ),
    _fault(
        "dgate of the gated output", "dropout_gate", "dgate", ROWS,
        "rest = (1.0 - weight[0],)", "rest = (weight[0],)",
    ),
    _fault(
        "head-mean weights: gradients without 1/H", "weights", "dq", PASSES,
        "self.factor = 1.0 / call.H if", "self.factor = 1.0 if",
    ),
    _fault(
        "head-mean weights: one head too few", "weights", "weights", PAIRS,
        "% loop_h", "% (loop_h - 1)",
    ),
    Fault(
        "importance counts rows past their item's length", "importance", "importance",
        (
            Edit(*PAIRS, "q_end = length(q_lens, b, N)", "q_end = N"),
            Edit(*STATISTICS, EACH_ITS_OWN, 'tl.where(lse == float("-inf"), 0.0, lse)'),
        ),
    ),
    # Causality, segments, masks.
    _fault(
        "causal: a key too many", "causal", "out", MAY_ATTEND,
        "m <= n + shift", "m <= n + shift + 1",
    ),
    _fault(
        "causal: a key too few", "causal", "out", MAY_ATTEND, "m <= n + shift", "m < n + shift",
    ),
    _fault(
        "causal: the last key of a row tile not visited", "causal_tall", "out", KEY_RANGE,
        "last + 1 + shift", "last + shift",
    ),
    _fault(
        "causal: a tile without masks too many", "causal", "out", KEY_RANGE,
        "least + 1 + shift", "least + 1 + FORM.block_m + shift",
    ),
    _fault(
        "causal: rows of a key tile begin a tile late", "causal_square", "dk", DKV,
        "start - shift, 0)", "start - shift + FORM.block_n, 0)",
    ),
    _fault(
        "segments: the range of keys a tile short", "segments", "out", KEY_RANGE,
        "low = tl.minimum(first, high) //", "low = FORM.block_m + tl.minimum(first, high) //",
    ),
    _fault(
        "segments: the range of rows a tile short", "segments", "dv", DKV,
        "high = end", "high = end - FORM.block_n",
    ),
    _fault(
        "segments: below instead of at most", "segments_at_most", "out", MAY_ATTEND,
        "segment <= own_segments", "segment < own_segments",
    ),
    _fault(
        "V of unseen keys is not zeroed", "mask", "out", VISIT, " v = only(v, ", " _ = only(v, ",
    ),
    _fault(
        "K of unseen keys is not zeroed", "mask", "dq", VISIT_DQ, " k = only(k, ", " _ = only(k, ",
    ),
    _fault(
        "q of rows that see nothing is not zeroed", "mask_dead_rows", "dk", DKV,
        " q = only(q, ", " _ = only(q, ",
    ),
    _fault(
        "dout of rows that see nothing is not zeroed", "mask_dead_rows", "dv", DKV,
        " dout = only(dout, ", " _ = only(dout, ",
    ),
    # Dropout.
    _fault(
        "dropout: all heads draw alike", "dropout", "out", DROPOUT,
        "sizes.heads + h\n", "sizes.heads + 0 * h\n",
    ),
    _fault(
        "dropout: the counter of keys a tile off", "dropout", "out", DROPOUT,
        "quad = start // 4", "quad = (start + FORM.block_m) // 4",
    ),
    _fault(
        "dropout: dq draws for another tile of keys", "dropout", "dq", VISIT_DQ,
        "dropout_keep(b, h, n, start,", "dropout_keep(b, h, n, start + FORM.block_m,",
    ),
    _fault(
        "dropout: heads of packed rows draw alike in dk and dv", "dropout_packed", "dv", DKV,
        "keep_h = h[:, None]", "keep_h = h[:, None] * 0",
    ),
    _fault(
        "dropout: dv without 1 / (1 - p)", "dropout", "dv", DKV,
        "dropped = tl.where(keep, p * keep_scale, 0.0)", "dropped = tl.where(keep, p, 0.0)",
    ),
]  # fmt: skip


@cache
def _truth(name: str) -> tolerance.Truth:
    return tolerance.truth(make_inputs(CASES[name], torch.float32))


def _check(name: str, backward: bool = True) -> None:
    """The case on the Triton backend, by the ruler, with NaN in everything that takes no part."""
    against = _truth(name)
    poisoned = against.inputs.poisoned()
    blind = ~poisoned.row_sees()[..., None]
    poisoned = dataclasses.replace(poisoned, dout=poisoned.dout.masked_fill(blind, float("nan")))
    with mmfast.use_backend("triton"):
        results = tolerance.run(mmfast.cross_attention, poisoned, backward)
    tolerance.assert_accurate(results, against)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    with planted(tmp_path / "kernels", *fault.edits):
        if isinstance(fault.caught, str):
            with pytest.raises(AssertionError, match=rf"(?m)^BAD {fault.caught}:"):
                _check(fault.case, backward=fault.caught.startswith("d"))
        else:
            with pytest.raises(fault.caught):
                _check(fault.case)


@pytest.fixture(scope="module")
def unplanted(interpreted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:  # noqa: F811
    """A copy of the kernels without a fault: nothing but the fault makes the cases fail."""
    with planted(tmp_path_factory.mktemp("unplanted") / "kernels"):
        yield


@pytest.mark.usefixtures("unplanted")
@pytest.mark.parametrize("name", CASES)
def test_passes_without_a_fault(name: str) -> None:
    _check(name)


def test_passes_by_descriptors(tmp_path: Path) -> None:
    with planted(tmp_path / "kernels", BY_DESCRIPTOR):
        _check("descriptors")


def test_every_case_has_a_fault() -> None:
    assert {fault.case for fault in FAULTS} == set(CASES)


@pytest.mark.parametrize(
    "where, old", [("inner", "no such piece"), ("inner", "product"), ("no_such_function", "tl.dot")]
)
def test_a_piece_that_is_not_there_once_is_an_error(where: str, old: str, tmp_path: Path) -> None:
    with (
        pytest.raises(pytest.fail.Exception, match="say anew where the fault goes"),
        planted(tmp_path / "kernels", Edit(_COMMON, where, old, "")),
    ):
        pass
