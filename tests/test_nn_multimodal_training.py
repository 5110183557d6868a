"""`mmfast.nn.MultimodalTransformer` in training, and in what torch does with modules."""

from __future__ import annotations

import copy
import doctest
import pickle
from typing import Any

import multimodal_helpers as helpers
import pytest
import torch
from multimodal_helpers import LENS, B, D, batch, features, make, same, targets
from nn_helpers import assert_near, gradients
from torch import Tensor

import mmfast.nn.multimodal_transformer as implementation
from mmfast.nn import MultimodalTransformer

PATTERNS = ("all_to_all", "to_anchor", "bottleneck")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- training ----------------------------------------------------------------------------------


def test_frozen_encoders() -> None:
    encoder = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(0.9))
    encoders = {"image": encoder, "text": torch.nn.Linear(5, 5), "audio": None}
    model = make(encoders=encoders, frozen=["image"], dropout=0.0).train()
    assert not encoder.training and model.training
    inputs = batch()
    same(model(inputs).features, model(inputs).features)
    model(inputs, targets=targets()).loss.backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert model.encoders["text"].weight.grad.abs().sum() > 0


def test_modality_dropout() -> None:
    model = make(dropout=0.0, modality_dropout={"image": 0.5, "text": 0.9}).train()
    inputs, present = batch(200), torch.rand(200, 3) < 0.7
    torch.manual_seed(1)
    out = model(inputs, present=present)
    torch.manual_seed(1)
    assert torch.equal(out.features, model(inputs, present=present).features)
    kept = out.modality_weights > 0
    assert not (kept & ~present).any()
    assert kept.any(1).equal(present.any(1))  # one of those that it has always stays
    assert kept[:, 2].equal(present[:, 2])
    shares = [float((kept & present)[:, k].sum() / present[:, k].sum()) for k in range(2)]
    assert 0.4 < shares[0] < 0.75 and 0.05 < shares[1] < 0.4
    model.eval()
    same(model(inputs, present=kept).features, out.features)
    assert (model(inputs, present=present).modality_weights > 0).equal(present)


def test_gradients_of_unused_parameters() -> None:
    for unused in (False, True):
        torch.manual_seed(0)
        model = make(zero_unused=unused)
        inputs = batch()
        del inputs["audio"]
        model(inputs, targets={"label": targets()["label"]}).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert all((g is None) != unused for n, g in grads.items() if "audio" in n)
        assert (grads["heads.score.weight"] is None) != unused
        if unused:
            assert all(g is not None for g in grads.values())
            for name, grad in grads.items():
                used = "audio" not in name and "score" not in name and "projs.2" not in name
                if name.endswith("k_proj.bias"):
                    continue  # drops out of the softmax
                assert bool((grad != 0).any()) == used, name
        else:
            same_as = {n: g for n, g in grads.items() if g is not None}
    same({n: grads[n] for n in same_as}, same_as)


def test_distributed_data_parallel(tmp_path: Any) -> None:
    """One process is enough: it raises as well where a parameter of the step before got nothing."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        for options, settings in (({"zero_unused": True}, {}), ({}, _FIND)):
            model = torch.nn.parallel.DistributedDataParallel(make(**options), **settings)
            for _ in range(2):
                inputs = batch()
                del inputs["image"]
                model(inputs, targets={"label": targets()["label"]}).loss.backward()
    finally:
        dist.destroy_process_group()


_FIND = {"find_unused_parameters": True}


# --- in torch ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "bottleneck", "num_layers": 1, "heads": {}, "losses": {}},
        *(pytest.param({"pattern": p}, marks=pytest.mark.slow) for p in PATTERNS),
    ],
    ids=str,
)
def test_compiled(options: dict[str, Any]) -> None:
    model, inputs = make(**options), batch()

    precise = copy.deepcopy(model).double()
    names = ["out", *(name for name, _ in model.named_parameters())]

    def call(m: MultimodalTransformer, *xs: Tensor, lens: Tensor | None = None) -> Tensor:
        return features(m, *xs, lens=None if lens is None else {"image": lens})

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for lens in (LENS["image"],) if options.get("num_layers") else (None, LENS["image"]):
        results = []
        for function, m in ((call, precise), (call, model), (compiled, model)):
            dtype = m.fusion.gate_proj.weight.dtype
            out = function(m, *(x.to(dtype) for x in inputs.values()), lens=lens)
            results.append([out, *gradients(out, m)])
        for name, exact, eager, got in zip(names, *results, strict=True):
            assert_near(name, got, exact, eager)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_autocast(pattern: str) -> None:
    model, inputs = make(pattern=pattern), batch()
    expected = features(model, *inputs.values(), lens=LENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = features(model, *inputs.values(), lens=LENS)
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()
    for parameter, grad in zip(model.parameters(), gradients(got, model), strict=True):
        assert grad.dtype == parameter.dtype and grad.isfinite().all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_empty(pattern: str) -> None:
    model = make(pattern=pattern)
    out = model(
        batch(0), lens={"text": torch.zeros(0, dtype=torch.long)}, targets=targets(0),
        return_importance=True, return_attention=True,
    )  # fmt: skip
    assert out.features.shape == (0, D) and out.loss == 0
    out.loss.backward()
    no_tokens = {**batch(), "image": torch.randn(B, 0, 6)}
    rest = {n: x for n, x in no_tokens.items() if n != "image"}
    same(model(no_tokens).features, model(rest).features)


def test_module() -> None:
    model, inputs = make(), batch()
    expected = model(inputs).features
    assert torch.equal(copy.deepcopy(model)(inputs).features, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs).features, expected)  # noqa: S301
    options = {"encoders": dict.fromkeys(helpers.WIDTHS), "widths": helpers.WIDTHS, "d_model": D}
    meta = MultimodalTransformer(**options, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in meta.parameters())
    states = []
    for build in (lambda: make(), lambda: meta.to_empty(device="cpu")):
        module = build()
        torch.manual_seed(3)
        module.reset_parameters()
        states.append({n: p.clone() for n, p in module.named_parameters()})
        assert all(p.isfinite().all() for p in module.parameters())
    assert "MultimodalTransformer" in repr(model) and "all_to_all" in repr(model)


def test_examples() -> None:
    assert doctest.testmod(implementation).failed == 0
