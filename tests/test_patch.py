"""`mmfast.patch`: what it exchanges, what it leaves, what stays as it is, and the way back."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from nn_helpers import loud
from torch import Tensor, nn

import mmfast
from mmfast.integrations import fingerprints, registry
from mmfast.testing.architectures import _harness, all_architectures

pytest.importorskip("transformers", reason="transformers is not installed")

LXMERT = "transformers.models.lxmert.modeling_lxmert."


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, dict[str, Any]]:
    """Attention chosen by name, layers by class."""
    return _harness.tiny(all_architectures()["bert"])


@pytest.fixture(scope="module")
def lxmert() -> tuple[nn.Module, dict[str, Any]]:
    """Attention written out: all by class."""
    return _harness.tiny(all_architectures()["lxmert"])


def stack() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32))
    return loud(nn.ModuleDict({"encoder": encoder, "head": nn.Linear(32, 3)})).eval()


X, PAD = torch.randn(2, 5, 32), torch.arange(5) >= torch.tensor([[5], [3]])


def run(model: Any) -> Tensor:
    return model["encoder"](X, src_key_padding_mask=PAD)[~PAD]


def result(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        got, expected, rtol=0.0, atol=2e-5 * float(expected.detach().abs().max())
    )


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def names(report: Any) -> set[str]:
    return {row.name for row in report.swapped}


# --- what stays, and the way back ----------------------------------------------------------------


def test_everything_but_the_class_stays() -> None:
    """The same objects: parameters, buffers, hooks, registries; flags and dtypes as they were."""
    model = stack().double()
    model["encoder"].layers[1].train()
    model["encoder"].layers[0].linear1.weight.requires_grad_(False)
    seen: list[str] = []
    layer = model["encoder"].layers[0]
    layer.register_forward_hook(lambda module, args, out: seen.append("after"))
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    parameters = {name: id(value) for name, value in model.named_parameters()}
    keys, training = list(model.state_dict()), [m.training for m in model.modules()]
    before = classes(model)
    dicts = {name: dict(module.__dict__) for name, module in model.named_modules()}
    expected = model["encoder"](X.double())
    seen.clear()

    report = mmfast.patch(model)
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert [m.training for m in model.modules()] == training
    after = classes(model)
    for name, cls in before.items():
        assert issubclass(after[name], cls)
        assert after[name].__name__ == cls.__name__
    assert {name for name in before if after[name] is not before[name]} == names(report)
    close(model["encoder"](X.double()), expected)
    assert seen == ["before", "after"]

    report.undo()
    assert classes(model) == before
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == dicts
    assert torch.equal(model["encoder"](X.double()), expected)


def test_patch_twice_and_undo_twice() -> None:
    model = stack()
    before = classes(model)
    expected = run(model)
    first = mmfast.patch(model)
    patched = classes(model)
    second = mmfast.patch(model)
    assert not second.swapped
    assert {row.reason for row in second.left} == {"patched before"}
    assert {row.name for row in second.left} == names(first)
    assert classes(model) == patched
    second.undo()
    assert classes(model) == patched, "it has exchanged nothing"
    first.undo()
    first.undo()
    assert classes(model) == before
    assert torch.equal(run(model), expected)
    assert len(mmfast.patch(model).swapped) == len(first.swapped)


@pytest.mark.parametrize("name", ["bert", "lxmert"])
def test_undo_of_a_model_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    original, inputs = request.getfixturevalue(name)
    model = copy.deepcopy(original)
    before, chosen = classes(model), model.config._attn_implementation
    config = model.config.to_dict()
    expected = result(model, inputs)
    report = mmfast.patch(model)
    assert model.config._attn_implementation == ("mmfast" if name == "bert" else chosen)
    assert original.config._attn_implementation == chosen
    report.undo()
    assert classes(model) == before
    assert model.config._attn_implementation == chosen
    assert model.config.to_dict() == config
    assert torch.equal(result(model, inputs), expected)


def test_undo_after_moving_and_casting() -> None:
    """What was patched is found wherever it is; it stays where it was moved."""
    model = stack()
    report = mmfast.patch(model)
    model.to(torch.float64).to("meta")
    report.undo()
    assert classes(model) == classes(stack())
    assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())


def test_undo_after_parts_were_replaced() -> None:
    model = stack()
    report = mmfast.patch(model)
    gone = model["encoder"].layers[1]
    model["encoder"].layers[1] = nn.Identity()
    model["other name"] = model["encoder"].layers[0]
    report.undo()
    assert type(model["other name"]) is nn.TransformerEncoderLayer
    assert type(gone) is not nn.TransformerEncoderLayer, "no longer of the model"


def test_a_report_does_not_keep_a_model() -> None:
    model = stack()
    report, alive = mmfast.patch(model), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    report.undo()
    assert "TransformerEncoder" in str(report)


def test_tied_weights_and_shared_modules() -> None:
    model = stack()
    encoder = model["encoder"]
    model["again"] = encoder  # one module under two names
    encoder.layers[1].linear1.weight = encoder.layers[0].linear1.weight
    expected = run(model)
    report = mmfast.patch(model)
    assert model["again"] is encoder
    assert encoder.layers[1].linear1.weight is encoder.layers[0].linear1.weight
    assert len(names(report)) == len(report.swapped) == 5
    close(run(model), expected)
    report.undo()
    assert type(encoder) is nn.TransformerEncoder


# --- copies and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_patched_and_can_be_unpatched(how: str, bert: Any) -> None:
    original, inputs = bert
    for model, call in ((stack(), run), (copy.deepcopy(original), lambda m: result(m, inputs))):
        expected = call(model)
        before = classes(model)
        report = mmfast.patch(model)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            twin = pickle.loads(pickle.dumps(model))  # noqa: S301
        assert classes(twin) == classes(model)
        close(call(twin), expected)
        report.undo()
        assert classes(model) == before != classes(twin), "a report is of its model alone"
        mmfast.unpatch(twin)
        assert classes(twin) == before
        assert torch.equal(call(twin), expected)


def test_a_pickle_opens_in_another_process(tmp_path: Path) -> None:
    """One that has patched nothing yet."""
    model = stack()
    mmfast.patch(model)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    torch.save([X, PAD, run(model)], tmp_path / "tensors")
    code = """
        import pickle, sys, torch
        model = pickle.load(open("model", "rb"))
        x, pad, expected = torch.load("tensors")
        out = model["encoder"](x, src_key_padding_mask=pad)[~pad]
        assert type(model["encoder"]).__module__ == "mmfast.integrations._swapped"
        assert torch.allclose(out, expected, atol=1e-4)
        import mmfast
        mmfast.unpatch(model)
        assert type(model["encoder"]) is torch.nn.TransformerEncoder
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True,
        text=True, timeout=120, check=False,
        env={"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_unpickling_reaches_registered_classes_only() -> None:
    from mmfast.integrations import _swapped

    for name in ("os/system", "torch/nn/modules/linear/Linear", "system"):
        with pytest.raises(AttributeError):
            getattr(_swapped, name)


def test_state_dicts_go_both_ways() -> None:
    model, other = stack(), stack()
    torch.nn.init.zeros_(other["encoder"].layers[0].linear1.weight)
    mmfast.patch(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other["encoder"].layers[0].linear1.weight,
                       model["encoder"].layers[0].linear1.weight)  # fmt: skip
    model.load_state_dict(stack().state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    stack().load_state_dict(torch.load(file))


@pytest.mark.parametrize("name", ["bert", "lxmert"])
def test_save_pretrained_of_a_patched_model(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The folder of the stock model, byte for byte in its configuration; it loads as stock."""
    original, inputs = request.getfixturevalue(name)
    model = copy.deepcopy(original)
    expected = result(model, inputs)
    model.save_pretrained(tmp_path / "stock")
    mmfast.patch(model)
    model.save_pretrained(tmp_path / "patched")
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("stock", "patched")]
    assert configs[0] == configs[1]
    loaded = type(original).from_pretrained(tmp_path / "patched").eval()
    assert torch.equal(result(loaded, inputs), expected)


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
    assert f"known to work: transformers {versions[-1]}" in left[0].reason
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


def test_nothing_is_patched_by_importing() -> None:
    """Nor is anything imported that the models do not bring."""
    code = """
        import sys, torch
        before = {n: vars(getattr(torch.nn, n)).copy() for n in dir(torch.nn) if n[0].isupper()}
        import mmfast
        model = torch.nn.TransformerEncoderLayer(32, 2, batch_first=True)
        mmfast.patch(model)
        assert "transformers" not in sys.modules
        for name, content in before.items():
            assert vars(getattr(torch.nn, name)) == content, name
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
        timeout=120, check=False, cwd="/",
        env={"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
