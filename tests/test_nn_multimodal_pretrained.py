"""`MultimodalTransformer.save_pretrained` and `from_pretrained`: bits, files, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal_helpers import LENS, batch, make, targets
from torch import Tensor
from torch.nn import Linear, Module

from mmfast.nn import MultimodalTransformer

pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Tied(Module):
    """Two names for one parameter, and a parameter that is part of a larger storage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = self.second = Linear(width, width)
        self.part = torch.nn.Parameter(torch.randn(4, width)[1])
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.part


def load(folder: Path, **options: Any) -> MultimodalTransformer:
    options.setdefault("encoders", {"image": Linear(6, 6)})
    return MultimodalTransformer.from_pretrained(folder, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["to_anchor", "bottleneck"])
def test_the_same_bits(pattern: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(pattern=pattern, modality_dropout={"image": 0.3}).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = load(tmp_path / "new" / "folder", encoders={"image": Linear(6, 6, dtype=dtype)})
    assert not loaded.training
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]) and value.dtype == state[name].dtype, name
    inputs = batch(dtype=dtype)
    expected = model(inputs, lens=LENS, targets=targets())
    got = loaded(inputs, lens=LENS, targets=targets())
    assert torch.equal(got.features, expected.features) and torch.equal(got.loss, expected.loss)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert repr(loaded) == repr(model)


def test_the_configuration_is_what_it_was(tmp_path: Path) -> None:
    model = make(frozen=["image"], loss_weights={"score": 0.5}, dropout=0.3, zero_unused=True)
    model.save_pretrained(tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = ((tmp_path / x / "config.json").read_text() for x in "ab")
    assert first == second
    changed = load(tmp_path / "a", dropout=0.0, frozen=[], dtype=torch.float64)
    assert changed.frozen == () and changed.fusion.gate_proj.weight.dtype == torch.float64
    assert changed.encoders["image"].weight.requires_grad


def test_tied_and_partial_weights(tmp_path: Path) -> None:
    encoders = {"image": Tied(6), "text": None, "audio": None}
    model = make(encoders=encoders)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, encoders={"image": Tied(6)})
    assert loaded.encoders["image"].first.weight is loaded.encoders["image"].second.weight
    inputs = batch()
    assert torch.equal(loaded(inputs).features, model(inputs).features)


def test_encoders_from_a_registry(tmp_path: Path) -> None:
    spec = {"kind": "patches", "width": 6}
    model = make(encoder_specs={"image": spec})
    model.save_pretrained(tmp_path)
    loaded = MultimodalTransformer.from_pretrained(
        tmp_path, registry={"patches": lambda width: Linear(width, width)}
    )
    inputs = batch()
    assert torch.equal(loaded(inputs).features, model(inputs).features)
    with pytest.raises(ValueError, match="kind 'patches', but registry has \\['vit'\\]"):
        MultimodalTransformer.from_pretrained(tmp_path, registry={"vit": Linear})


def test_encoders_kept_elsewhere(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path, include_encoders=False)
    assert torch.equal(
        load(tmp_path, encoders={"image": model.encoders["image"]})(batch()).features.isfinite(),
        torch.ones(4, 16, dtype=torch.bool),
    )
    fresh = Linear(6, 6)
    weight = fresh.weight.clone()
    assert torch.equal(load(tmp_path, encoders={"image": fresh}).encoders["image"].weight, weight)


def test_modules_and_functions_are_given_again(tmp_path: Path) -> None:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return (logits - target).square().mean()

    heads = {"label": 3, "map": torch.nn.Sequential(Linear(16, 4), torch.nn.Tanh())}
    model = make(heads=heads, losses={"map": loss}, activation=torch.nn.functional.relu)
    model.save_pretrained(tmp_path)
    given: dict[str, Any] = {
        "heads": {"map": torch.nn.Sequential(Linear(16, 4), torch.nn.Tanh())},
        "activation": torch.nn.functional.relu,
    }
    inputs, target = batch(), {"map": torch.ones(4, 4)}
    loaded = load(tmp_path, losses={"map": loss}, **given)
    expected = model(inputs, targets=target)
    assert torch.equal(loaded(inputs, targets=target).loss, expected.loss)
    loaded = load(tmp_path, **given)
    assert torch.equal(loaded(inputs).logits["map"], expected.logits["map"])
    with pytest.raises(ValueError, match="loss of head 'map' was a function"):
        loaded(inputs, targets=target)
    for missing, match in (("heads", "head 'map' was a module"), ("activation", "the activation")):
        with pytest.raises(ValueError, match=match):
            load(tmp_path, **{k: v for k, v in given.items() if k != missing})


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json in"):
        load(tmp_path / "nothing")
    model = make(encoder_specs={"image": {"kind": object()}})
    with pytest.raises(TypeError, match="does not fit into JSON"):
        model.save_pretrained(tmp_path / "object")
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="modality 'image' had an encoder; give it again"):
        load(tmp_path, encoders={})
    with pytest.raises(ValueError, match="encoders has 'smell', but the model has"):
        load(tmp_path, encoders={"image": Linear(6, 6), "smell": None})
    with pytest.raises(ValueError, match=r"other shapes: encoders\.image\.weight"):
        load(tmp_path, encoders={"image": Linear(9, 6)})
    with pytest.raises(ValueError, match=r"has encoders.*, which the model does not have"):
        load(tmp_path, encoders={"image": None})
    config = json.loads((tmp_path / "config.json").read_text())
    for change, match in (
        ({"format": 2}, "has format 2"),
        ({"class": "Other"}, "describes 'Other'"),
        ({"model": None}, "is not whole"),
        ({"dtype": "load"}, "'load' is no floating-point dtype"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=match):
            load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no model\.safetensors in"):
        load(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        make().save_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    make().save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make().save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
