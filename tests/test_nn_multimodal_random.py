"""Random `MultimodalTransformer`s on random batches against the same model item by item."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from multimodal_helpers import make, plain
from torch import Tensor

from mmfast.nn import PackedTokens, _encoding
from mmfast.nn._modality_stream import ModalityStream


def options(draw: random.Random, names: list[str]) -> dict[str, Any]:
    layers, pattern = draw.randint(1, 3), draw.choice(["all_to_all", "to_anchor", "bottleneck"])
    return {
        "pattern": pattern,
        "anchor": draw.choice(names) if pattern == "to_anchor" else None,
        "num_layers": layers,
        "fusion_layer": draw.choice([0, 0, 0, layers // 2]),
        "norm_first": draw.random() < 0.5,
        "pooling": draw.choice(["attention", "mean", "first"]),
        "fusion": draw.choice(["softmax", "sigmoid", "gmu"]),
        "heads": {},
        "losses": {},
    }


def gradients(out: Tensor, model: torch.nn.Module) -> list[Tensor]:
    parameters = list(model.parameters())
    if not out.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    grads = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def check(seed: int, patch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    names = ["a", "b", "c", "d"][: draw.randint(1, 4)]
    widths = {name: draw.choice([3, 6, 8]) for name in names}
    encoders = {n: draw.choice([None, torch.nn.Linear(w, w)]) for n, w in widths.items()}
    model = make(encoders=encoders, widths=widths, **options(draw, names)).double()
    B = draw.randint(1, 5)
    given = {
        name: torch.randn(B, draw.randint(0, 7), widths[name], dtype=torch.float64)
        for name in names
        if name == names[0] or draw.random() < 0.85
    }
    lens = {
        name: torch.tensor([draw.randint(0, x.shape[1]) for _ in range(B)])
        for name, x in given.items()
        if draw.random() < 0.6
    }
    present = None if draw.random() < 0.5 else torch.rand(B, len(names)) < 0.7
    valid, inputs, asked = {}, dict[str, Any](), dict(lens)
    for k, name in enumerate(names):
        if name not in given:
            if present is not None:
                present[:, k] = False
            continue
        x = given[name].clone()
        there = torch.ones(B, dtype=torch.bool) if present is None else present[:, k]
        count = lens.get(name, torch.full((B,), x.shape[1]))
        valid[name] = torch.where(there, count, 0)
        inputs[name] = x
        if encoders[name] is None:
            x[torch.arange(x.shape[1]) >= valid[name].unsqueeze(1)] = torch.nan
            form = draw.choice(["padded", "packed", "tuple"])
            if form == "packed":
                inputs[name] = PackedTokens.from_padded(x, valid[name])
                asked.pop(name, None)
            elif form == "tuple":
                inputs[name] = (x, asked.pop(name, count))
        else:
            x[~there] = torch.nan
    if draw.random() < 0.4:  # as on accelerators and under torch.compile
        patch.setattr(ModalityStream, "packable", lambda self: False)
        patch.setattr(_encoding, "readable", lambda tensor: False)
    maps = {"return_importance": draw.random() < 0.5, "return_attention": draw.random() < 0.5}
    out = model(inputs, lens=asked, present=present, **maps)
    features, weights, _ = plain(model, given, valid)
    exact: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(out.features, features, **exact)
    weights = weights.mean(-1) if weights.dim() == 3 else weights
    torch.testing.assert_close(out.modality_weights, weights, **exact)
    got, expected = gradients(out.features, model), gradients(features, model)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-6)
    again = model(inputs, lens=asked, present=present, **maps)
    assert torch.equal(again.features, out.features)


@pytest.mark.parametrize("seed", range(12))
def test_random_models(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(seed, monkeypatch)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100, 400, 20))
def test_many_random_models(seed: int) -> None:
    for offset in range(20):
        with pytest.MonkeyPatch.context() as patch:
            check(seed + offset, patch)
