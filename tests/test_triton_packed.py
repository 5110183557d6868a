"""Packed rows in the Triton attention kernels, interpreted under the guard: as padded ones.

The launchers are called as the op calls them. A packed call has the tiles of the padded call, so
its results are the same bits; what lies outside of the items is NaN here, and never read.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_helpers import interpreted, requires_triton  # noqa: F401

import mmfast
from mmfast.testing import packing, tolerance
from mmfast.testing.cases import CROSS_ATTENTION, make_inputs
from mmfast.testing.packing import SIDES

pytestmark = [requires_triton, pytest.mark.usefixtures("interpreted")]

NAN = float("nan")
FIRST, REST = 3, 2  # rows that are no item's, before and after


class Rows:
    """Items of given lengths, padded to `longest`, and where they begin when packed."""

    def __init__(self, lens: tuple[int, ...], longest: int, packed: bool) -> None:
        self.lens = torch.tensor(lens, dtype=torch.int32)
        self.longest, self.packed = longest, packed
        ends = list(accumulate(lens, initial=FIRST))
        self.starts = torch.tensor(ends, dtype=torch.int32) if packed else None
        self.total = ends[-1] + REST

    def pack(self, x: Tensor, dim: int = 2) -> Tensor:
        """The items of a padded tensor one after the other, NaN around them; B is then 1."""
        if self.starts is None:
            return x
        shape = [*x.shape]
        shape[0], shape[dim] = 1, self.total
        made = torch.full(shape, NAN, dtype=x.dtype)
        for item, start, size in zip(x, self.starts.tolist(), self.lens.tolist(), strict=False):
            made[0].narrow(dim - 1, start, size).copy_(item.narrow(dim - 1, 0, size))
        return made

    def padded(self, x: Tensor, dim: int = 2) -> Tensor:
        """Back again; what is no item's has to be 0."""
        if self.starts is None:
            return x
        shape = [*x.shape]
        shape[0], shape[dim] = len(self.lens), self.longest
        made, rest = torch.zeros(shape, dtype=x.dtype), x.clone()
        for item, start, size in zip(made, self.starts.tolist(), self.lens.tolist(), strict=False):
            item.narrow(dim - 1, 0, size).copy_(x[0].narrow(dim - 1, start, size))
            rest[0].narrow(dim - 1, start, size).zero_()
        assert torch.equal(rest, torch.zeros_like(rest))
        return made


def poisoned(x: Tensor, lens: Tensor, dim: int = 2) -> Tensor:
    """NaN past the length of each item."""
    for item, size in zip(x, lens.tolist(), strict=True):
        item.narrow(dim - 1, size, item.shape[dim - 1] - size).fill_(NAN)
    return x


def problem(
    q_rows: Rows, kv_rows: Rows, H: int, G: int, D: int, Dv: int, gate: str = "", **given: Any
) -> dict[str, Any]:
    """Padded tensors; `Dv` 0: the keys are the values."""
    torch.manual_seed(0)
    B, N, M = len(q_rows.lens), q_rows.longest, kv_rows.longest
    width = Dv or D
    made = {
        "q": poisoned(torch.randn(B, H, N, D), q_rows.lens),
        "k": poisoned(torch.randn(B, G, M, D), kv_rows.lens),
        "v": poisoned(torch.randn(B, G, M, Dv), kv_rows.lens) if Dv else None,
        "dout": poisoned(torch.randn(B, H, N, width), q_rows.lens),
        "dlse": torch.randn(B, H, N),
        "gate": None, "bias": None, "mask": None, "segments": (None, None), "seed": None,
        "dropout_p": 0.0, "is_causal": False, "scale": D**-0.5, "segment_rule": 0,
    }  # fmt: skip
    if gate:
        shape = (B, N, H) if gate == "head" else (B, N, H, width)
        made["gate"] = poisoned(torch.randn(shape), q_rows.lens, 1)
    return made | given


def run(x: dict[str, Any], q_rows: Rows, kv_rows: Rows) -> dict[str, Tensor]:
    """Forward and backward; results as if they were padded."""
    from mmfast.kernels.cross_attention import cross_attention_fwd
    from mmfast.kernels.cross_attention_bwd import cross_attention_bwd

    q, dout = q_rows.pack(x["q"]), q_rows.pack(x["dout"])
    k, v = (None if one is None else kv_rows.pack(one) for one in (x["k"], x["v"]))
    gate = None if x["gate"] is None else q_rows.pack(x["gate"], 1)
    conditions = (
        kv_rows.lens, q_rows.lens, *x["segments"], x["mask"], x["bias"], q_rows.starts,
        kv_rows.starts,
    )  # fmt: skip
    rules = (
        x["is_causal"], x["segment_rule"],
        q_rows.longest if q_rows.packed else 0, kv_rows.longest if kv_rows.packed else 0,
    )  # fmt: skip
    rest = *conditions, gate, x["seed"], x["scale"], x["dropout_p"], *rules
    out, lse = cross_attention_fwd(q, k, v, *rest)
    dq, dk, dv, dbias, dgate = cross_attention_bwd(
        dout, x["dlse"], q, k, v, out, lse, *rest, x["bias"] is not None, True
    )
    found = {"out": q_rows.padded(out), "lse": lse, "dq": q_rows.padded(dq)}
    found |= {"dk": kv_rows.padded(dk), "dbias": dbias}
    if v is None:
        assert dv.shape == (0,)
    else:
        found["dv"] = kv_rows.padded(dv)
    if gate is not None:
        found["dgate"] = q_rows.padded(dgate, 1)
    return found


def assert_as_padded(q_lens: tuple[int, ...], kv_lens: tuple[int, ...], packed: str, **sizes: Any):
    """The same bits packed and padded."""
    longest = max(q_lens), max(kv_lens)
    q_rows, kv_rows = Rows(q_lens, longest[0], False), Rows(kv_lens, longest[1], False)
    x = problem(q_rows, kv_rows, **sizes)
    expected = run(x, q_rows, kv_rows)
    got = run(
        x, Rows(q_lens, longest[0], "q" in packed), Rows(kv_lens, longest[1], "k" in packed)
    )  # fmt: skip
    for name, one in expected.items():
        assert not one.isnan().any(), name
        assert torch.equal(got[name], one), name


LENS = (5, 0, 3), (33, 20, 130)


@pytest.mark.parametrize("packed", ["qk", "k", pytest.param("q", marks=pytest.mark.slow)])
def test_as_padded(packed):
    """Splits, a merge, heads in one tile, and everything that has a place in a packed tensor."""
    B, H, N, M = 3, 2, max(LENS[0]), max(LENS[1])
    torch.manual_seed(1)
    assert_as_padded(
        *LENS, packed, H=H, G=1, D=16, Dv=40, gate="full" if packed == "q" else "head",
        bias=torch.randn(1, H, N, M), mask=torch.rand(B, 1, N, M) < 0.7,
        seed=torch.tensor([5]), dropout_p=0.2, is_causal=packed == "k",
    )  # fmt: skip


def test_one_split(monkeypatch):
    """As large problems have; rows of one head in several tiles."""
    from mmfast.kernels import _tuning

    monkeypatch.setattr(_tuning, "ATTENTION_PROGRAMS", 1)
    segments = torch.randint(0, 3, (2, 70)), torch.randint(0, 3, (2, 90))
    segments = tuple(one.int() for one in segments)
    assert_as_padded(
        (70, 41), (20, 90), "qk", H=2, G=2, D=16, Dv=16, gate="head", segments=segments
    )


def test_by_descriptors(monkeypatch):
    from mmfast.kernels import _tuning

    monkeypatch.setattr(_tuning, "wants_descriptors", lambda name, work: True)
    assert_as_padded((5, 3), (70, 90), "qk", H=2, G=1, D=16, Dv=16)


@pytest.mark.parametrize("rows_first", [True, False])
def test_what_is_kept_of_a_launch(rows_first, monkeypatch):
    """Another number of rows is another launch only where strides depend on it."""
    from mmfast.kernels import _attention_call, cross_attention

    monkeypatch.setattr(_attention_call, "KEEP_EVERYWHERE", True)
    monkeypatch.setattr(cross_attention, "_plans", {})
    for lens in ((5, 2), (5, 4), (5, 2)):
        ends = torch.tensor(list(accumulate(lens, initial=0)), dtype=torch.int32)
        x = torch.randn(sum(lens), 2, 16).transpose(0, 1)
        x = x if rows_first else x.contiguous()
        options = {"q_cu_seqlens": ends, "kv_cu_seqlens": ends, "max_q_len": 5, "max_kv_len": 5}
        with mmfast.use_backend("triton"):
            out = mmfast.cross_attention(x, x, x, **options)
        torch.testing.assert_close(out, mmfast.reference.cross_attention(x, x, x, **options))
    assert len(cross_attention._plans) == (1 if rows_first else 2)


@pytest.mark.slow
@pytest.mark.parametrize("sides", SIDES, ids="_and_".join)
@pytest.mark.parametrize("name", [
    "gqa_3_ragged", "both_lens", "causal_lens", "segments_everything", "results_everything",
])  # fmt: skip
def test_cases_of_the_registry(name, sides):
    """Through the op, by the ruler."""
    against = tolerance.truth(make_inputs(CROSS_ATTENTION[name]))
    with mmfast.use_backend("triton"):
        results = tolerance.run(packing.packed(mmfast.cross_attention, sides), against.inputs)
    tolerance.assert_accurate(results, against)


def test_importance_and_weights():
    from mmfast.kernels.cross_attention import cross_attention_fwd
    from mmfast.kernels.cross_attention_probs import (
        cross_attention_probs,
        cross_attention_probs_bwd,
    )

    found = []
    for packed in (False, True):
        q_rows, kv_rows = Rows(LENS[0], 5, packed), Rows(LENS[1], 130, packed)
        x = problem(q_rows, kv_rows, 2, 1, 16, 16, bias=torch.ones(1, 2, 1, 130))
        q, k, v = q_rows.pack(x["q"]), kv_rows.pack(x["k"]), kv_rows.pack(x["v"])
        given = (
            kv_rows.lens, q_rows.lens, None, None, None, x["bias"], q_rows.starts, kv_rows.starts
        )  # fmt: skip
        longest = (5, 130) if packed else (0, 0)
        _, lse = cross_attention_fwd(q, k, v, *given, None, None, 0.25, 0.0, False, 0, *longest)
        rules = 0.25, False, 0, *longest
        importance, weights = cross_attention_probs(q, k, lse, *given, *rules, True, 2)
        torch.manual_seed(2)
        dq, dk, dbias, dlse = cross_attention_probs_bwd(
            torch.randn(importance.shape), torch.randn(weights.shape), q, k, lse, *given, *rules,
            True,
        )  # fmt: skip
        found.append((importance, weights, q_rows.padded(dq), kv_rows.padded(dk), dbias, dlse))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected) and not ours.isnan().any()


@pytest.mark.parametrize("lens", [(), (0, 0)])
def test_no_rows(lens):
    """No item, and items without rows: there is nothing but rows outside of them."""
    q_rows, kv_rows = Rows(lens, 4, True), Rows(lens, 4, True)
    q, k = q_rows.pack(torch.randn(max(1, len(lens)), 2, 4, 16)), torch.randn(1, 2, 5, 16)
    assert q.isnan().all()
    found = run(
        {"q": q, "k": k, "v": k, "dout": q, "dlse": torch.zeros(len(lens), 2, 4), "gate": None,
         "bias": None, "mask": None, "segments": (None, None), "seed": None, "dropout_p": 0.0,
         "is_causal": False, "scale": 1.0, "segment_rule": 0},
        _Whole(q_rows), _Whole(kv_rows),
    )  # fmt: skip
    assert all(not found[name].any() for name in ("out", "dq", "dk", "dv"))


class _Whole:
    """Rows whose tensors are packed already."""

    def __init__(self, rows: Rows) -> None:
        self.lens, self.starts, self.longest, self.packed = rows.lens, rows.starts, 4, True

    def pack(self, x: Tensor) -> Tensor:
        return x

    padded = pack


def test_lengths_beyond_what_was_said():
    """An item longer than max_q and max_kv: its first rows count, and the rest of it is 0."""
    q, k = torch.randn(1, 1, 12, 16), torch.randn(1, 1, 60, 16)
    rows = Rows((5, 7), 4, True), Rows((25, 35), 20, True)
    for one, starts in zip(rows, ((0, 5, 12), (0, 25, 60)), strict=True):
        one.starts = torch.tensor(starts, dtype=torch.int32)
    x = {"q": q, "k": k, "v": k, "dout": torch.randn(q.shape), "dlse": None, "gate": None,
         "bias": None, "mask": None, "segments": (None, None), "seed": None, "dropout_p": 0.0,
         "is_causal": False, "scale": 1.0, "segment_rule": 0}  # fmt: skip
    for one in rows:
        one.pack = one.padded = lambda x, dim=2: x
    found = run(x, *rows)
    for name, ends in (("out", (4, 5, 9, 12)), ("dq", (4, 5, 9, 12)), ("dv", (20, 25, 45, 60))):
        pieces = found[name].tensor_split(ends, 2)
        assert [bool(piece.any()) for piece in pieces] == [True, False, True, False, False], name
