"""The parity tests of architectures find what could go wrong in a drop-in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import mmfast
from mmfast.integrations import _attention, _interface, _packing
from mmfast.testing.architectures import _harness, all_architectures

pytest.importorskip("transformers", reason="transformers is not installed")

CASES = all_architectures()


def wrong_scale(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        scale = kwargs.pop("scale", None) or q.shape[-1] ** -0.5
        return op(q, *args, scale=1.05 * scale, **kwargs)

    return call


def padding_seen(op: Callable[..., Any]) -> Callable[..., Any]:
    """One key more than there is, where padding follows; no mask."""

    def call(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        if kwargs.get("kv_lens") is not None:
            kwargs["kv_lens"] = (kwargs["kv_lens"] + 1).clamp(max=k.shape[2])
        return op(q, k, v, **{**kwargs, "mask": None})

    return call


def always_causal(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **{**kwargs, "is_causal": True})

    return call


def never_causal(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **{**kwargs, "is_causal": False})

    return call


def no_bias(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **{**kwargs, "bias": None})

    return call


FAULTS = [
    ("lxmert", wrong_scale),
    ("lxmert", always_causal),
    ("bert", padding_seen),
    ("clip", never_causal),
    ("bart", always_causal),
    ("bart", never_causal),
    ("t5", no_bias),
    ("t5", wrong_scale),
    ("mllama", always_causal),
    ("llama", never_causal),
    ("grounding_dino", wrong_scale),
    ("perceiver", wrong_scale),
]


def _cases() -> Any:
    for model_type, fault in FAULTS:
        for form in ("packed", "padded"):
            if fault is padding_seen and form == "packed":
                continue  # there is no padding that could be seen
            yield pytest.param(
                model_type, fault, form == "packed", id=f"{model_type}-{fault.__name__}-{form}"
            )


@pytest.mark.parametrize("model_type, fault, packed", _cases())
def test_a_planted_fault_is_found(
    model_type: str, fault: Any, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[model_type]
    original, inputs = _harness.tiny(case)
    truth = _harness.truth_of(case, original, inputs)
    peer = _harness.run(copy.deepcopy(original), inputs, case)
    model = copy.deepcopy(original)
    mmfast.patch(model)
    with _harness.counted(least_work=0 if packed else 10**12):
        _harness.compare("output", _harness.run(model, inputs, case)[0], peer[0], truth[0])
        monkeypatch.setattr(_attention, "cross_attention", fault(_attention.cross_attention))
        got = _harness.run(model, inputs, case)
    with pytest.raises(AssertionError, match="off by"):
        _harness.compare("output", got[0], peer[0], truth[0])


def test_a_lost_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["bert"]
    original, inputs = _harness.tiny(case)
    truth = _harness.truth_of(case, original, inputs)
    peer = _harness.run(copy.deepcopy(original), inputs, case)
    mmfast.patch(original)
    right = _packing.Layout.pack
    with _harness.counted():
        monkeypatch.setattr(
            _packing.Layout, "pack", lambda layout, rows: right(layout, rows.roll(1, 1))
        )
        got = _harness.run(original, inputs, case)
    with pytest.raises(AssertionError, match="off by"):
        _harness.compare("output", got[0], peer[0], truth[0])


def test_a_fault_of_gradients_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that give nothing back."""
    case = CASES["lxmert"]
    original, inputs = _harness.tiny(case)
    truth = _harness.truth_of(case, original, inputs)
    peer = _harness.run(copy.deepcopy(original), inputs, case)
    mmfast.patch(original)
    with _harness.counted():
        op = _attention.cross_attention
        monkeypatch.setattr(
            _attention, "cross_attention",
            lambda q, k, v, **kw: op(q, k, v, **kw) + 0.02 * (v.sum() - v.detach().sum()),
        )  # fmt: skip
        got = _harness.run(original, inputs, case)
    _harness.compare("output", got[0], peer[0], truth[0])
    with pytest.raises(AssertionError, match="off by"):
        _harness.compare("gradient", got[1], peer[1], truth[1])


def test_a_mask_function_that_says_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers drops padding without a word where an implementation has no mask function."""
    case = CASES["bert"]
    original, inputs = _harness.tiny(case)
    truth = _harness.truth_of(case, original, inputs)
    peer = _harness.run(copy.deepcopy(original), inputs, case)
    mmfast.patch(original)
    monkeypatch.setitem(
        __import__("transformers").AttentionMaskInterface._global_mapping,
        _interface.NAME, lambda *args, **kwargs: None,
    )  # fmt: skip
    got = _harness.run(original, inputs, case)
    with pytest.raises(AssertionError, match="off by"):
        _harness.compare("output", got[0], peer[0], truth[0])
