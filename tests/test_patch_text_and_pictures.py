"""What the drop-in does for CLIP and its kin beside parity: activations, caches, pooled padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import mmfast
from mmfast.testing.architectures import _harness, all_architectures, ragged_mask

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CASES = all_architectures()


@pytest.mark.parametrize("name", ["quick_gelu", "gelu_new", "gelu_fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activation(name: str, dtype: torch.dtype) -> None:
    """No further from float64 than the stock one, gradients too; the input is not written to."""
    from transformers.activations import ACT2FN

    stock, ours = ACT2FN[name], copy.deepcopy(ACT2FN[name])
    assert mmfast.patch(ours).swapped
    x = (4 * torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))).to(dtype)

    def run(module: Any, leaf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = leaf.clone().requires_grad_()
        out = module(leaf)
        out.backward(torch.ones_like(out))
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    with torch.no_grad():
        plain = ours(x)
    assert plain.data_ptr() != x.data_ptr()
    if name == "quick_gelu":
        assert torch.equal(plain, stock(x))
    exact, peer, got = run(stock, x.double()), run(stock, x), run(ours, x)
    for right, theirs, value in zip(exact, peer, got, strict=True):
        allowed = 2 * (theirs - right).abs().max() + torch.finfo(dtype).eps
        assert (value - right).abs().max() <= allowed
    assert (plain - exact[0]).abs().max() <= 2 * (peer[0] - exact[0]).abs().max()


@pytest.mark.parametrize("model_type", ["git", "kosmos-2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_filled_from_packed_rows(model_type: str, side: Any) -> None:
    """Prefill without padding: the next step reads the same keys and values."""
    case = CASES[model_type]
    model, _ = _harness.tiny(case)
    prompt = case.prompt(model)  # type: ignore[misc]
    if side == "right":
        mask = ragged_mask(3, prompt["input_ids"].shape[1])
        prompt["attention_mask"] = mask
        prompt["input_ids"] = prompt["input_ids"].masked_fill(mask == 0, 1)
    step = {
        "input_ids": torch.tensor([[7], [8], [9]]),
        "attention_mask": torch.cat([prompt["attention_mask"], torch.ones(3, 1).long()], 1),
    }

    def two_steps() -> tuple[torch.Tensor, Any]:
        with torch.no_grad():
            first = model(**prompt, use_cache=True)
            cache = first.past_key_values
            again = dict(step, past_key_values=cache, use_cache=True)
            if model_type == "kosmos-2":
                again["image_embeds"] = first.image_embeds
            return model(**again).logits, cache

    expected, stock_cache = two_steps()
    mmfast.patch(model)
    with _harness.counted() as calls:
        got, cache = two_steps()
    assert calls.packed == 2
    assert cache.get_seq_length() == stock_cache.get_seq_length()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    pictures = cache.get_seq_length() - 1 - prompt["attention_mask"].shape[1]
    valid = torch.cat([torch.ones(3, pictures).long(), step["attention_mask"]], 1).bool()
    for ours, stock in zip(cache.layers, stock_cache.layers, strict=True):
        for of, other in ((ours.keys, stock.keys), (ours.values, stock.values)):
            of, other = of.transpose(1, 2), other.transpose(1, 2)
            torch.testing.assert_close(of[valid], other[valid], rtol=1e-4, atol=1e-4)
            assert not of[~valid].any()


def test_a_cache_that_holds_something_is_left_as_it_is() -> None:
    """The second half of a prompt attends to the first: its rows are not packed."""
    case = CASES["kosmos-2"]
    model, _ = _harness.tiny(case)
    mask = ragged_mask(3, 12)
    ids = torch.randint(5, 90, (3, 12), generator=torch.Generator().manual_seed(5))
    text = model.text_model

    def halves() -> torch.Tensor:
        with torch.no_grad():
            first = text(input_ids=ids, use_cache=True)
            whole = torch.cat([torch.ones_like(mask), mask], 1)
            return text(
                input_ids=ids, attention_mask=whole, past_key_values=first.past_key_values
            ).logits

    expected = halves()
    mmfast.patch(model)
    with _harness.counted() as calls:
        got = halves()
    assert calls.packed == 0 and calls.attention == 4
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_git_without_a_picture_is_causal() -> None:
    """Words alone: the mask is causal with padding, and packed as such."""
    model, inputs = _harness.tiny(CASES["git"])
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**words).logits
        mmfast.patch(model)
        with _harness.counted() as calls:
            got = model(**words).logits
    assert (calls.attention, calls.packed) == (2, 2)
    rows = words["attention_mask"].bool()
    torch.testing.assert_close(got[rows], expected[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [0, 1])
def test_siglip_pools_the_last_row(last: int) -> None:
    """The pooled row is that of padding where there is padding; nothing attends to it."""
    model, inputs = _harness.tiny(CASES["siglip"])
    inputs["attention_mask"][:, -1] = last
    with torch.no_grad():
        expected = model(**inputs).text_model_output
        mmfast.patch(model)
        with _harness.counted() as calls:
            got = model(**inputs).text_model_output
    assert calls.packed == 2
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-4)


def test_weights_of_the_attentions_that_are_written_out() -> None:
    """Recorded attentions come in full, with padding left in."""
    for model_type in ("git", "groupvit"):
        model, inputs = _harness.tiny(CASES[model_type])
        part = model if model_type == "git" else model.text_model
        if model_type == "groupvit":
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = part(**inputs, output_attentions=True).attentions
            mmfast.patch(model)
            with _harness.counted() as calls:
                got = part(**inputs, output_attentions=True).attentions
        assert calls.packed == 0
        assert len(got) == len(expected) == 2
        words = inputs["attention_mask"]
        pictures = torch.ones(len(words), expected[0].shape[2] - words.shape[1]).long()
        rows = torch.cat([pictures, words], 1).bool()
        for ours, stock in zip(got, expected, strict=True):
            ours, stock = ours.transpose(1, 2)[rows], stock.transpose(1, 2)[rows]
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
