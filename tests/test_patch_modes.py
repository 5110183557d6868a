"""Patched models in every mode that the stock ones know: precision, checkpointing, recording ..."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.integrations import _packing
from mmfast.testing.architectures import _harness, all_architectures

pytest.importorskip("transformers", reason="transformers is not installed")

CASES = all_architectures()
MODELS = ["bert", "lxmert", "bart", "clip", "llama"]


@pytest.fixture(autouse=True)
def everything_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packing, "LEAST_WORK", 0)


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, dict[str, Any], Any]:
    """(stock model, patched copy, inputs, case)"""
    case = CASES[request.param]
    stock, inputs = _harness.tiny(case)
    patched = copy.deepcopy(stock)
    mmfast.patch(patched)
    return stock, patched, inputs, case


def gradients(model: nn.Module, inputs: dict[str, Any], case: Any) -> dict[str, Tensor]:
    return _harness.run(model, inputs, case)[1]


def close(got: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert set(got) == set(right)
    largest = max(float(value.abs().max()) for value in right.values())
    for name, value in got.items():
        error = float((value.float() - right[name].float()).abs().max())
        assert error <= tolerance * largest, f"{name}: {error:.2e} of {largest:.2e}"


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16(pair: Any, how: str) -> None:
    """As far from float32 as the stock model is in bfloat16, at most twice."""
    stock, patched, inputs, case = pair
    right = _harness.run(stock, inputs, case, backward=False)[0]
    results = []
    for model in (stock, patched):
        if how == "weights":
            results.append(_harness.run(model.bfloat16(), inputs, case, backward=False)[0])
        else:
            with torch.autocast("cpu", torch.bfloat16):
                results.append(_harness.run(model, inputs, case, backward=False)[0])
    for name, value in right.items():
        theirs, ours = ((result[name].float() - value).norm() for result in results)
        assert results[1][name].dtype == results[0][name].dtype
        assert ours <= 2 * theirs + 1e-3 * value.norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(pair: Any, reentrant: bool) -> None:
    """The same gradients, with layers whose rows are packed once more in the backward."""
    _, model, inputs, case = pair
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{type(model).__name__} does not know it, in transformers either")
    for module in model.modules():  # training mode for checkpointing, no dropout for comparing
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _without_dropout(model)
    model.train()
    right = gradients(model, inputs, case)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # it wants an input that has a gradient
        model.enable_input_require_grads()
    with _harness.counted() as calls:
        got = gradients(model, inputs, case)
    assert calls.packed > case.packed  # some more in the backward
    close(got, right, 1e-6)


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name in ("dropout", "activation_dropout", "attention_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def test_dropout_is_of_the_generator(pair: Any) -> None:
    """One seed, one result; another, another."""
    _, model, inputs, case = pair
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.3)
    found = []
    for seed in (1, 1, 2):
        with torch.no_grad():
            torch.manual_seed(seed)
            found.append(case.outputs(model(**inputs), inputs))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])
        assert not torch.equal(found[0][name], found[2][name])
        assert torch.isfinite(found[2][name]).all()


def test_recorded_states(pair: Any) -> None:
    """output_hidden_states and output_attentions give what the stock model gives."""
    stock, patched, inputs, _ = pair
    options = {"output_hidden_states": True, "output_attentions": True}
    getattr(stock, "set_attn_implementation", lambda name: None)("eager")
    with torch.no_grad():
        right, got = stock(**inputs, **options), patched(**inputs, **options)
    seen = 0
    for name, value in right.items():
        if "hidden_states" not in name and "attentions" not in name:
            continue
        assert len(got[name]) == len(value), name
        of_decoder = name.startswith(("decoder", "cross")) and "decoder_attention_mask" in inputs
        mask = inputs["decoder_attention_mask" if of_decoder else "attention_mask"].bool()
        for ours, theirs in zip(got[name], value):
            assert ours.shape == theirs.shape
            rows = mask.shape == theirs.shape[:2]
            if theirs.dim() == 4:  # weights: rows of text that are not padding
                rows = mask.shape == (theirs.shape[0], theirs.shape[2])
                ours, theirs = ours.transpose(1, 2), theirs.transpose(1, 2)
            if rows:
                ours, theirs = ours[mask], theirs[mask]
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
            seen += 1
    assert seen > 3 or not hasattr(right, "hidden_states")


def test_hidden_states_of_packed_layers() -> None:
    """Recording them alone leaves layers packed, and padded outside."""
    case = CASES["bert"]
    stock, inputs = _harness.tiny(case)
    patched = copy.deepcopy(stock)
    mmfast.patch(patched)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad(), _harness.counted() as calls:
        got = patched(**inputs, output_hidden_states=True).hidden_states
        right = stock(**inputs, output_hidden_states=True).hidden_states
    assert calls.packed == case.packed
    for ours, theirs in zip(got, right, strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], atol=2e-5, rtol=2e-5)


def test_hooks_inside_see_padded_rows() -> None:
    """A user's hook on a module inside a layer keeps that layer's rows padded."""
    case = CASES["bert"]
    model, inputs = _harness.tiny(case)
    mmfast.patch(model)
    shapes = []
    layer = model.encoder.layer[0]
    handle = layer.intermediate.register_forward_hook(lambda m, i, o: shapes.append(i[0].shape))
    with torch.no_grad(), _harness.counted() as calls:
        model(**inputs)
        assert shapes[0][:2] == inputs["attention_mask"].shape
        assert calls.packed == case.packed - 1
        handle.remove()
        calls.packed = 0
        model(**inputs)
    assert calls.packed == case.packed


def test_inference_mode(pair: Any) -> None:
    stock, patched, inputs, case = pair
    with torch.inference_mode():
        right = case.outputs(stock(**inputs), inputs)
        got = case.outputs(patched(**inputs), inputs)
    close(got, right, 2e-5)


def test_without_padding(pair: Any) -> None:
    """Nothing to leave out, and no mask at all."""
    stock, patched, inputs, _ = pair
    masks = {name: torch.ones_like(x) for name, x in inputs.items() if name.endswith("mask")}
    with torch.no_grad(), _harness.counted() as calls:
        for change in (masks, dict.fromkeys(masks)):
            full = {**inputs, **change}
            got, right = patched(**full), stock(**full)
            torch.testing.assert_close(got[0], right[0], atol=3e-5, rtol=3e-5)
    assert calls.packed == 0


def test_nan_in_padding() -> None:
    """Embeddings of padding may be anything: the tokens and the gradients do not see them."""
    case = CASES["bert"]
    model, inputs = _harness.tiny(case)
    mmfast.patch(model)
    mask = inputs["attention_mask"]
    embeds = model.embeddings.word_embeddings(inputs["input_ids"]).detach()
    found = []
    for filler in (0.0, float("nan")):
        states = torch.where(mask[..., None] == 0, filler, embeds)
        model.zero_grad()
        out = model.encoder(
            states, attention_mask=(1.0 - mask[:, None, None, :]) * torch.finfo(torch.float32).min
        ).last_hidden_state
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.encoder.parameters())])
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("model_type", ["bert", pytest.param("clip", marks=pytest.mark.slow)])
def test_compiled(model_type: str) -> None:
    """One graph; padding is computed there, and is garbage as in the stock model."""
    case = CASES[model_type]
    model, inputs = _harness.tiny(case)
    mmfast.patch(model)
    with torch.no_grad():
        right = case.outputs(model(**inputs), inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got = case.outputs(compiled(**inputs), inputs)
    close(got, right, 3e-5)


@pytest.mark.parametrize("model_type", ["visual_bert", "bert"])
@pytest.mark.parametrize("how", ["exclude", "set afterwards"])
def test_layers_pad_for_an_attention_that_is_not_ours(model_type: str, how: str) -> None:
    """Excluded, or given another implementation since: it sees padded rows."""
    case = CASES[model_type]
    stock, inputs = _harness.tiny(case)
    attention, layer = {
        "visual_bert": ("VisualBertSelfAttention", "VisualBertLayer"),
        "bert": ("BertSelfAttention", "BertLayer"),
    }[model_type]
    with torch.no_grad():
        right = case.outputs(stock(**inputs), inputs)
        if how == "exclude":
            report = mmfast.patch(stock, exclude=attention)
        else:
            report = mmfast.patch(stock)
            if model_type == "visual_bert":
                pytest.skip("its attention is written out: it has no other implementation")
            stock.set_attn_implementation("sdpa")
        assert layer in {row.cls for row in report.swapped}
        with _harness.counted() as calls:
            got = case.outputs(stock(**inputs), inputs)
    assert (calls.attention, calls.packed) == (0, 0)
    close(got, right, 2e-5)


@pytest.mark.parametrize("model_type", ["bert", "mllama", "deformable_detr"])
def test_training_after_inference_mode(model_type: str) -> None:
    """With the same masks: what is made in inference mode cannot be saved for a backward."""
    case = CASES[model_type]
    model, inputs = _harness.tiny(case)
    if model_type == "bert":  # a mask that is given as it is, and so outlives the call
        valid = inputs["attention_mask"][:, None, None, :].bool()
        inputs["attention_mask"] = torch.zeros(valid.shape).masked_fill(
            ~valid, torch.finfo(torch.float32).min
        )
        case = dataclasses.replace(case, outputs=lambda result, _: {"pooled": result[1]})
    right = gradients(model, inputs, case)
    mmfast.patch(model)
    with torch.inference_mode():
        model(**inputs)
    with _harness.counted() as calls:
        got = gradients(model, inputs, case)
    assert calls.packed == case.packed
    close(got, right, 1e-4)
