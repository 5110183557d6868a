"""What the drop-in does for LXMERT, BLIP and their kin beside parity: masks, maps, Q-Former."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.integrations import _packing
from mmfast.testing.architectures import _harness, all_architectures, ragged_mask

pytest.importorskip("transformers", reason="transformers is not installed")

CASES = all_architectures()


def pair(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """(stock model, patched copy, inputs)"""
    stock, inputs = _harness.tiny(CASES[name])
    patched = copy.deepcopy(stock)
    assert mmfast.patch(patched).swapped
    return stock, patched, inputs


def close(got: Tensor, right: Tensor) -> None:
    """Up to rounding, for values of size 1 or so; faults show at 0.1 and more."""
    assert got.shape == right.shape
    off, size = (float(x.detach().abs().max()) for x in (got - right, right))
    assert off < 5e-5 * max(1.0, size)


def same_outputs(name: str, stock: Any, patched: Any, inputs: dict[str, Any]) -> _harness.Calls:
    """Compare them; how often the library was called."""
    right = _harness.run(stock, inputs, CASES[name], backward=False)[0]
    with _harness.counted() as calls:
        got = _harness.run(patched, inputs, CASES[name], backward=False)[0]
    # What is made from the first row says something where that is a token.
    mask = inputs.get("attention_mask")
    first = slice(None) if mask is None else mask[:, 0].bool()
    for key, value in right.items():
        rows = first if key == "pooled" else ...
        close(got[key][rows], value[rows])
    return calls


def masks(how: str, batch: int, length: int) -> Tensor:
    mask = ragged_mask(batch, length, 0.7)
    if how == "left":
        return mask.flip(1)
    if how == "within":
        mask = torch.ones_like(mask)
        mask[0, 2:4] = mask[1, 1] = mask[2, -3:-1] = 0
    if how == "all shorter":
        mask[:, -2:] = 0
    return mask


@pytest.mark.parametrize("how", ["left", "within", "all shorter"])
@pytest.mark.parametrize("name", ["lxmert-masked-regions", "visual_bert", "bert", "instructblip"])
def test_padding_anywhere(name: str, how: str) -> None:
    stock, patched, inputs = pair(name)
    key = "qformer_attention_mask" if name == "instructblip" else "attention_mask"
    inputs[key] = masks(how, *inputs[key].shape)
    assert same_outputs(name, stock, patched, inputs).packed


@pytest.mark.parametrize("padded", ["text", "regions"])
def test_lxmert_with_one_stream_packed(padded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has little padding: it stays, and its mask counts."""
    monkeypatch.setattr(_packing, "LARGEST_SHARE", 0.8)
    name = "lxmert-masked-regions"
    stock, patched, inputs = pair(name)
    little = {"text": "visual_attention_mask", "regions": "attention_mask"}[padded]
    inputs[little] = torch.ones_like(inputs[little])
    inputs[little][1, -1] = inputs[little][2, -2:] = 0
    calls = same_outputs(name, stock, patched, inputs)
    assert calls.packed == {"text": 4, "regions": 3}[padded]


@pytest.mark.parametrize("hf_compat", [True, False])
def test_lxmert_without_an_image(hf_compat: bool) -> None:
    """Nothing to see: the mean of all values as in transformers, or 0."""
    stock, _, inputs = pair("lxmert-masked-regions")
    inputs["visual_attention_mask"][1] = 0
    patched = copy.deepcopy(stock)
    mmfast.patch(patched, hf_compat=hf_compat)
    right = stock(**inputs)
    with _harness.counted():
        got = patched(**inputs)
    others, text = [0, 2], inputs["attention_mask"].bool()
    close(got.language_output[others][text[others]], right.language_output[others][text[others]])
    close(got.pooled_output[others], right.pooled_output[others])
    off = float((got.language_output - right.language_output)[1][text[1]].abs().max().detach())
    assert off < 5e-5 if hf_compat else off > 1e-2


@pytest.mark.parametrize(
    "name",
    ["lxmert-masked-regions", "visual_bert", "vilt", "flava", "bridgetower", "blip", "blip-2",
     "instructblip", "bert-decoder", "layoutlm", "layoutlmv3", "clap"],
)  # fmt: skip
def test_padding_left_in(name: str) -> None:
    """Too little work for packing: masks do what packing does elsewhere."""
    stock, patched, inputs = pair(name)
    right = _harness.run(stock, inputs, CASES[name], backward=False)[0]
    with _harness.counted(least_work=1 << 60) as calls:
        got = _harness.run(patched, inputs, CASES[name], backward=False)[0]
    assert (calls.attention, calls.packed) == (CASES[name].calls, 0)
    for key, value in right.items():
        close(got[key], value)


MAPS = {
    "lxmert": ("language_attentions", "vision_attentions", "cross_encoder_attentions"),
    "visual_bert": ("attentions",),
    "vilt": ("attentions",),
    "blip-retrieval": ("attentions",),
    "layoutlmv3": ("attentions",),
    "bert": ("attentions",),
}


@pytest.mark.parametrize("name", MAPS)
def test_attention_maps(name: str) -> None:
    """Asked for at call time: the maps of the stock model's eager attention."""
    stock, patched, inputs = pair(name)
    stock.set_attn_implementation("eager")
    with _harness.counted():
        torch.manual_seed(0)
        right = stock(**inputs, output_attentions=True)
        torch.manual_seed(0)
        got = patched(**inputs, output_attentions=True)
    for key in MAPS[name]:
        assert len(getattr(got, key)) == len(getattr(right, key)) > 0
        for mine, theirs in zip(getattr(got, key), getattr(right, key), strict=True):
            close(mine, theirs)


def test_attention_maps_of_blip_text() -> None:
    stock, patched, inputs = pair("blip-retrieval")
    question = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    question |= {"encoder_hidden_states": torch.randn(3, 5, 32), "output_attentions": True}
    right = stock.text_encoder(**question)
    with _harness.counted() as calls:
        got = patched.text_encoder(**question)
    assert calls.packed == 0
    for key in ("attentions", "cross_attentions"):
        assert len(right[key]) == 2
        for mine, theirs in zip(got[key], right[key], strict=True):
            close(mine, theirs)


def test_a_query_that_is_masked() -> None:
    """Then the rows of queries are no block, and nothing is packed."""
    stock, patched, _ = pair("instructblip")
    queries = stock.query_tokens.expand(3, -1, -1)
    length = queries.shape[1]
    mask = torch.cat((torch.ones(3, length, dtype=torch.long), ragged_mask(3, 8)), 1)
    mask[1, 2] = 0
    given = {
        "input_ids": torch.randint(5, 90, (3, 8)),
        "attention_mask": mask,
        "encoder_hidden_states": torch.randn(3, 17, 32),
    }
    right = stock.qformer(query_embeds=queries, **given).last_hidden_state
    with _harness.counted() as calls:
        got = patched.qformer(query_embeds=queries, **given).last_hidden_state
    assert calls.packed == 0
    close(got[mask.bool()], right[mask.bool()])


@pytest.mark.parametrize("name", ["blip-2", "instructblip"])
@pytest.mark.parametrize("least_work", [0, 1 << 60])
def test_queries_of_padded_images(name: str, least_work: int) -> None:
    """A Q-Former by itself may be told which patches are none."""
    stock, patched, _ = pair(name)
    patches = torch.randn(3, 17, 32)
    given: dict[str, Any] = {
        "encoder_hidden_states": patches,
        "encoder_attention_mask": ragged_mask(3, 17),
    }
    queries = stock.query_tokens.expand(3, -1, -1)
    if name == "instructblip":
        given["input_ids"] = torch.randint(5, 90, (3, 8))
        given["attention_mask"] = torch.cat(
            (torch.ones(3, queries.shape[1], dtype=torch.long), ragged_mask(3, 8)), 1
        )
    right = stock.qformer(query_embeds=queries, **given).last_hidden_state
    with _harness.counted(least_work) as calls:
        got = patched.qformer(query_embeds=queries, **given).last_hidden_state
    assert bool(calls.packed) == (name == "instructblip" and not least_work)
    rows = given.get("attention_mask", torch.ones(right.shape[:2])).bool()
    close(got[rows], right[rows])


def test_blip_beams() -> None:
    """The cache of self- and cross-attention, reordered between steps."""
    stock, patched, _ = pair("blip")
    prompt = CASES["blip"].prompt(stock)  # type: ignore[misc]
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert torch.equal(patched.generate(**prompt, **options), stock.generate(**prompt, **options))


def test_blip_padded_prompts() -> None:
    """They fill the caches from packed rows."""
    stock, patched, inputs = pair("blip")
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    prompt["attention_mask"] = prompt["attention_mask"].flip(1)
    options = {"max_new_tokens": 5, "do_sample": False}
    right = stock.generate(**prompt, **options)
    with _harness.counted() as calls:
        got = patched.generate(**prompt, **options)
    assert calls.packed == 2
    assert torch.equal(got, right)


def test_blip_computes_the_padding_of_questions() -> None:
    """Its answers attend to it; undo leaves no mark, and the encoder alone leaves padding out."""
    stock, patched, inputs = pair("blip-vqa")
    assert same_outputs("blip-vqa", stock, copy.deepcopy(patched), inputs).packed == 2
    mmfast.unpatch(patched)
    marks = [key for m in patched.modules() for key in m.__dict__ if "mmfast" in key]
    assert not marks
    question = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    right = patched.text_encoder(**question).last_hidden_state
    mmfast.patch(patched.text_encoder)
    with _harness.counted() as calls:
        got = patched.text_encoder(**question).last_hidden_state
    assert calls.packed == 2
    rows = question["attention_mask"].bool()
    close(got[rows], right[rows])
