"""Attention whose keys are its values in Triton, interpreted under the guard: any head width."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from planted_faults import Edit, planted
from test_triton_packed import assert_as_padded
from torch import Tensor
from triton_helpers import interpreted, requires_triton  # noqa: F401

import mmfast
from mmfast.testing import tolerance
from mmfast.testing.cases import Case, make_inputs

pytestmark = [requires_triton, pytest.mark.usefixtures("interpreted")]

# The interpreter's tiles: 16 rows, 32 keys, 128 channels.
CASES = {
    case.name: case
    for case in (
        Case("plain", 2, 2, 3, 40, 264),
        Case("split", 1, 4, 5, 130, 264, G=2),
        Case("tall", 1, 1, 20, 40, 384),
        Case("many_tiles", 1, 1, 1, 1100, 264),
        Case("wide", 1, 3, 1, 33, 1100, G=1),
        Case("lens", 3, 2, 3, 70, 264, G=1, kv_lens=(70, 33, 0), q_lens=(1, 3, 3)),
        Case("causal", 1, 1, 20, 70, 264, is_causal=True),
        Case("segments", 2, 2, 5, 70, 264, G=1, segments="images", segment_rule="at_most"),
        Case("mask", 1, 2, 5, 40, 264, mask="BHNM", mask_kind="dead_columns"),
        Case("mask_dead_rows", 1, 1, 5, 40, 264, mask="B1NM", mask_kind="dead_rows"),
        Case("bias", 2, 2, 3, 40, 264, G=1, bias="1H1M", scale=-0.1),
        Case("bias_full", 1, 2, 3, 40, 264, bias="BHNM", bias_kind="infinite"),
        Case("dropout_gate", 1, 2, 3, 70, 264, G=1, dropout_p=0.3, gate="full"),
        Case("gate_head", 1, 2, 3, 40, 264, gate="head", dlse=True),
        Case("results", 2, 2, 3, 40, 264, G=1, importance=True, weights="mean", bias="1HNM",
             kv_lens=(40, 7)),
        Case("results_per_head", 1, 2, 3, 40, 264, importance=True, weights="per_head"),
        Case("no_keys", 1, 2, 3, 0, 264),
        Case("no_rows", 2, 2, 0, 40, 264),
    )
}  # fmt: skip


SELDOM = ("results_per_head", "bias", "tall")  # of which others have the parts


def _shared(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """k and v are equal: what is one tensor for the op has a gradient in both, the whole."""
    return mmfast.cross_attention(q, k + (v - v.detach()), None, **options)


def _truth(case: Case, dtype: torch.dtype) -> tolerance.Truth:
    """The ruler for keys that are the values: their gradient is the sum of two."""
    inputs = make_inputs(case, dtype)
    both = tolerance.truth(dataclasses.replace(inputs, v=inputs.k))
    return both._replace(
        exact=_whole(both.exact), peer=_whole(both.peer),
        stored={**both.stored, "dk": math.hypot(both.stored["dk"], both.stored["dv"])},
        sums={**both.sums, "dk": both.sums["dk"] + both.sums["dv"]},
    )  # fmt: skip


def _whole(results: tolerance.Results) -> tolerance.Results:
    rest = {name: one for name, one in results.items() if name != "dv"}
    return rest | {"dk": results["dk"] + results["dv"]}


def check(case: Case, dtype: torch.dtype = torch.float32) -> None:
    against = _truth(case, dtype)
    poisoned = against.inputs.poisoned()
    with mmfast.use_backend("triton"):
        results = tolerance.run(_shared, poisoned)
    whole = results.pop("dv")
    tolerance.assert_accurate(results, against)
    assert torch.equal(whole, results["dk"])


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in SELDOM else []) for name in CASES
])  # fmt: skip
def test_case(name):
    """By the ruler, with NaN in everything that takes no part."""
    check(CASES[name])


@pytest.mark.parametrize("name", [
    "split", "lens", "dropout_gate",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mask", "results", "wide", "causal")),
])  # fmt: skip
def test_float16(name, monkeypatch):
    """One split, as large problems have."""
    from mmfast.kernels import _tuning

    monkeypatch.setattr(_tuning, "ATTENTION_PROGRAMS", 1)
    check(CASES[name], torch.float16)


@pytest.mark.parametrize("packed", ["qk", pytest.param("k", marks=pytest.mark.slow)])
def test_packed_as_padded(packed):
    assert_as_padded(
        (3, 0, 5), (40, 7, 0), packed, H=2, G=1, D=264, Dv=0, gate="head",
        mask=torch.rand(3, 1, 5, 40) < 0.7, bias=torch.randn(1, 2, 1, 40),
    )  # fmt: skip


def test_narrow_rows():
    """The launchers take no values at any width; narrow ones are keys and values to the kernels."""
    assert_as_padded((3, 5), (40, 7), "qk", H=2, G=1, D=16, Dv=0)


@pytest.mark.parametrize("D", [16, 264])
def test_a_context_without_gradient(D, monkeypatch):
    """Nothing is launched for it; the other gradients are the same bits."""
    seen = _launched(monkeypatch)
    q, k = torch.randn(1, 2, 3, D), torch.randn(1, 1, 40, D)
    found = []
    for needed in (True, False):
        x, context = q.clone().requires_grad_(), k.clone().requires_grad_(needed)
        with mmfast.use_backend("triton"):
            mmfast.cross_attention(x, context, None).sum().backward()
        found.append(x.grad)
        if D > 256:
            assert ("shared_keys" in seen) == needed
            seen.clear()
    assert torch.equal(*found)


def test_what_is_launched(monkeypatch):
    """The kernels of wide rows are for those alone, and for keys that are the values."""
    seen = _launched(monkeypatch)
    with mmfast.use_backend("triton"):
        for width, names in ((256, ["fwd"]), (257, ["shared_scores", "shared_products"])):
            q, k = torch.randn(1, 2, 1, width), torch.randn(1, 1, 9, width)
            mmfast.cross_attention(q, k, None)
            assert seen == names
            seen.clear()
        with pytest.raises(RuntimeError, match="up to 256"):
            mmfast.cross_attention(q, k, k.clone())


def _launched(monkeypatch) -> list[str]:
    from mmfast.kernels import _launch

    seen, run = [], _launch._run

    def recorded(kernel, programs, args, constants):
        seen.append(kernel.fn.__name__.removeprefix("cross_attention_").removesuffix("_kernel"))
        run(kernel, programs, args, constants)

    monkeypatch.setattr(_launch, "_run", recorded)
    return seen


_FORWARD, _BACKWARD = "cross_attention_shared.py", "cross_attention_shared_bwd.py"
_PRODUCTS = _FORWARD, "cross_attention_shared_products_kernel"
_PAIRS, _KEYS = "cross_attention_shared_pairs_kernel", "cross_attention_shared_keys_kernel"
FAULTS = [
    ("many_tiles", "lse", _FORWARD, "_statistics", "total * tl.exp2(top - base) + ", ""),
    ("mask", "out", *_PRODUCTS, "if FORM.sparse:", "if FORM.causal:"),
    ("dropout_gate", "out", *_PRODUCTS, "dropout_keep(b, pair_h, n, start,",
     "dropout_keep(b, pair_h, n, start + 32,"),
    ("split", "out", *_PRODUCTS, "tl.maximum(low, part * chunk)", "low"),
    ("wide", "out", "_attention_wide.py", "load_columns", "mask & (c < SIZE)", "mask & (c < 1024)"),
    ("mask_dead_rows", "dk", _BACKWARD, _KEYS, "q = tl.where(sees", "_ = tl.where(sees"),
    ("dropout_gate", "dk", _BACKWARD, _PAIRS, "tl.where(keep, p * keep_scale, 0.0)", "p"),
    ("lens", "dk", _BACKWARD, _KEYS, "by_scores * natural_scale", "by_scores"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "caught", "file", "where", "old", "new"),
    FAULTS,
    ids=[f"{f[0]}-{f[3]}" for f in FAULTS],
)
def test_planted_faults_are_caught(name, caught, file, where, old, new, tmp_path):
    with (
        planted(tmp_path / "kernels", Edit(file, where, old, new)),
        pytest.raises(AssertionError, match=rf"(?m)^BAD {caught}:"),
    ):
        check(CASES[name])
