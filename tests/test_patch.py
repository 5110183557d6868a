"""`mmfast.patch`: what stays as it is, copies and files, and the way back."""

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
from patch_helpers import (
    PAD,
    X,
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

# Fixtures count as used where they are named.
__all__ = ["tiny_bert", "tiny_lxmert"]

pytest.importorskip("transformers", reason="transformers is not installed")

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
