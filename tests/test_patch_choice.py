"""`mmfast.patch`: what it exchanges, what it leaves and why, and its report."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from patch_helpers import (
    classes,
    close,
    names,
    result,
    run,
    stack,
    tiny_bert,
    tiny_lxmert,
)
from torch import nn

import mmfast
from mmfast.integrations import fingerprints, registry
from mmfast.testing.architectures import _harness

# Fixtures count as used where they are named.
__all__ = ["tiny_bert", "tiny_lxmert"]

pytest.importorskip("transformers", reason="transformers is not installed")

LXMERT = "transformers.models.lxmert.modeling_lxmert."

# --- include, exclude, strict --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"encoder", "encoder.layers.0", "encoder.layers.0.self_attn", "encoder.layers.1",
              "encoder.layers.1.self_attn"}),
        ({"include": "encoder.layers.1"}, {"encoder.layers.1", "encoder.layers.1.self_attn"}),
        ({"include": ["encoder.layers.?"], "exclude": "*.0"},
         {"encoder.layers.1", "encoder.layers.1.self_attn"}),
        ({"include": nn.TransformerEncoderLayer},
         {"encoder.layers.0", "encoder.layers.0.self_attn", "encoder.layers.1",
          "encoder.layers.1.self_attn"}),
        ({"include": "MultiheadAttention"},
         {"encoder.layers.0.self_attn", "encoder.layers.1.self_attn"}),
        ({"exclude": [nn.MultiheadAttention]}, set()),
        ({"exclude": "encoder"}, set()),
        ({"include": []}, set()),
        ({"include": "head"}, set()),
    ],
)  # fmt: skip
def test_include_and_exclude(options: dict[str, Any], expected: set[str]) -> None:
    model = stack()
    before, wanted = classes(model), run(model)
    report = mmfast.patch(model, **options)
    assert names(report) == expected
    changed = {name for name, cls in classes(model).items() if cls is not before[name]}
    assert changed == expected
    close(run(model), wanted)
    assert {row.name for row in report.left} | expected >= {"encoder", "encoder.layers.0"}
    report.undo()
    assert classes(model) == before


def test_a_layer_whose_attention_is_left_is_left() -> None:
    report = mmfast.patch(stack(), exclude=nn.MultiheadAttention)
    reasons = {row.name: row.reason for row in report.left}
    assert reasons["encoder.layers.0.self_attn"] == "excluded"
    assert "its attention" in reasons["encoder.layers.0"]
    assert reasons["encoder"] == "not all of its layers were exchanged"


def test_excluded_parts_of_a_model_of_transformers(bert: Any) -> None:
    """An attention by name that is excluded keeps its own function."""
    original, inputs = bert
    model = copy.deepcopy(original)
    expected = result(model, inputs)
    report = mmfast.patch(model, exclude="*layer.0")
    assert not any(".0" in row.name for row in report.swapped)
    assert any(".1" in row.name for row in report.swapped)
    with _harness.counted() as calls:
        got = result(model, inputs)
    assert calls.attention == 1
    valid = inputs["attention_mask"].bool()
    close(got[valid], expected[valid])
    report.undo()
    assert torch.equal(result(model, inputs), expected)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_wrong_names(option: str) -> None:
    with pytest.raises(TypeError, match=f"patch: {option} takes names of modules"):
        mmfast.patch(stack(), **{option: [3]})


@pytest.mark.parametrize("call", [mmfast.patch, mmfast.unpatch])
def test_not_a_module(call: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got dict"):
        call({})


class TheirAttention(nn.Module):
    """A class that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)


class TheirLayer(nn.TransformerEncoderLayer):
    """A subclass may do other things than its base."""


def test_unknown_classes_are_left_and_listed() -> None:
    model = stack()
    model["theirs"] = TheirAttention()
    model["layer"] = TheirLayer(32, 4)
    report = mmfast.patch(model)
    left = {row.name: (row.cls, row.reason) for row in report.left}
    assert left == {"theirs": ("TheirAttention", "no adapter for this class")}
    assert type(model["layer"]) is TheirLayer
    assert "layer.self_attn" in names(report)
    assert "TheirAttention" in str(report)


def test_strict_changes_nothing_where_anything_is_left() -> None:
    model = stack()
    model["theirs"] = TheirAttention()
    before = classes(model)
    with pytest.raises(RuntimeError, match=r"theirs \(TheirAttention\): no adapter"):
        mmfast.patch(model, strict=True)
    assert classes(model) == before
    report = mmfast.patch(model, strict=True, exclude="theirs")
    assert len(report.swapped) == 5
    mmfast.patch(model, strict=True, exclude="theirs")  # patched before is no reason


def test_a_class_whose_source_changed_is_left(lxmert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own source or by that of a class it relies on, with the version that is known."""
    original, inputs = lxmert
    row = registry.rows()[LXMERT + "LxmertAttention"]
    known = copy.deepcopy(fingerprints.known())
    versions = known[row.target].pop(next(iter(known[row.target])))
    known[row.target]["0123456789abcdef"] = versions
    monkeypatch.setattr(fingerprints, "known", lambda: known)
    model = copy.deepcopy(original)
    expected = result(model, inputs)
    report = mmfast.patch(model)
    left = [entry for entry in report.left if entry.cls == "LxmertAttention"]
    assert left
    assert not any(entry.cls == "LxmertAttention" for entry in report.swapped)
    assert f"known to work: transformers {', '.join(versions)}" in left[0].reason
    close(result(model, inputs), expected)
    report.undo()
    with pytest.raises(RuntimeError, match=r"the source of .*LxmertAttention is not one"):
        mmfast.patch(model, strict=True)


def test_a_forward_of_the_instance_is_left() -> None:
    model = stack()
    layer = model["encoder"].layers[0]
    layer.forward = lambda *args, **named: layer.__class__.forward(layer, *args, **named)
    report = mmfast.patch(model)
    reasons = {row.name: row.reason for row in report.left}
    assert "its forward was replaced on the instance" in reasons["encoder.layers.0"]
    assert "encoder.layers.1" in names(report)


# --- the report ----------------------------------------------------------------------------------


def test_the_report_says_what_happened(bert: Any) -> None:
    from rich.console import Console

    model = copy.deepcopy(bert[0])
    report = mmfast.patch(model)
    assert {row.cls for row in report.swapped} >= {"BertSelfAttention", "BertLayer"}
    by_name = next(row for row in report.swapped if row.cls == "BertSelfAttention")
    assert (by_name.kind, by_name.how) == ("attention", "name")
    console = Console(file=io.StringIO(), width=160)
    console.print(report.table())
    for text in (str(report), console.file.getvalue()):  # type: ignore[attr-defined]
        assert "BertLayer" in text
        assert "padding left out" in text
        assert f"{len(report.swapped)} swapped, {len(report.left)} left" in text
    assert repr(report) == f"<Report of BertModel: {len(report.swapped)} swapped, 0 left>"


def test_the_estimate() -> None:
    """With all parameters in layers that leave padding out, by how much less is computed."""
    model = stack()["encoder"]
    model.norm = None
    report = mmfast.patch(model)
    assert report.skipped_share() == 1.0
    assert report.estimate(0.5) == pytest.approx(2.0)
    assert report.estimate(1.0) == 1.0
    assert mmfast.patch(nn.Linear(3, 3)).estimate() == 1.0
    for wrong in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="share of tokens that are not padding"):
            report.estimate(wrong)
