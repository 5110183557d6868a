"""Encoder-decoders patched: caches, decoding, biases by position, what reaches into padding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.testing.architectures import _harness, all_architectures

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CASES = all_architectures()
TEXT = ("bart", "t5", "pix2struct", "whisper", "moonshine", "seamless_m4t_text", "speecht5", "dia")


def both(model_type: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """(stock, patched, inputs), in float64: what differs is not rounding."""
    stock, inputs = _harness.tiny(CASES[model_type])
    stock = stock.double()
    patched = copy.deepcopy(stock)
    mmfast.patch(patched)
    return stock, patched, {name: doubled(value) for name, value in inputs.items()}


def doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def prompt_of(model_type: str, model: nn.Module) -> dict[str, Any]:
    given = CASES[model_type].prompt
    assert given is not None
    return {name: doubled(value) for name, value in given(model).items()}


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("model_type", TEXT)
def test_a_cache_filled_from_packed_rows_goes_on_as_the_stock_one(model_type: str) -> None:
    """A padded target with `use_cache`, then one more token of each item."""
    stock, patched, inputs = both(model_type)
    name = "decoder_input_ids"
    mask, ids = inputs["decoder_attention_mask"], inputs[name]
    inputs["use_cache"] = True
    first = stock(**inputs)
    with _harness.counted() as calls:
        got = patched(**inputs)
    if model_type != "speecht5":
        assert calls.packed == CASES[model_type].packed
    outputs = CASES[model_type].outputs
    close(outputs(got, inputs)["logits"], outputs(first, inputs)["logits"])
    assert got.past_key_values.get_seq_length() == first.past_key_values.get_seq_length()
    more = dict(inputs)
    more[name] = ids[:, :1]
    more["decoder_attention_mask"] = torch.cat([mask, mask[:, :1]], 1)
    # The padded rows of the stock cache hold keys, those of ours hold 0: nobody sees either.
    expected = stock(**more, past_key_values=first.past_key_values).logits
    with _harness.counted():
        close(patched(**more, past_key_values=got.past_key_values).logits, expected)


@pytest.mark.parametrize("model_type", ["bart", "t5", "pix2struct", "seamless_m4t_text"])
def test_the_context_alone_is_packed_where_the_target_has_no_padding(model_type: str) -> None:
    stock, patched, inputs = both(model_type)
    del inputs["decoder_attention_mask"]
    for inputs["use_cache"] in (False, True):
        expected = stock(**inputs).logits
        with _harness.counted():
            close(patched(**inputs).logits, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("model_type", ["t5", "whisper"])
def test_decoding_with_each_cache(model_type: str, beams: int, cache: str) -> None:
    stock, patched, _ = both(model_type)
    prompt = prompt_of(model_type, stock)
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    options["cache_implementation"] = cache
    if cache == "static":
        options["disable_compile"] = True
    expected = stock.generate(**prompt, **options)  # type: ignore[operator]
    with _harness.counted() as calls:
        got = patched.generate(**prompt, **options)  # type: ignore[operator]
    assert calls.attention > 0
    assert torch.equal(got, expected)


def test_cross_attention_without_a_mask_is_not_causal() -> None:
    """As many queries as keys, and a module that calls itself causal."""
    stock, patched, inputs = both("bart")
    for model in (stock, patched):
        for module in model.modules():
            if type(module).__name__ == "BartAttention":
                module.is_causal = True
    length = 7
    given = {
        "input_ids": inputs["input_ids"][:1, :length],
        "decoder_input_ids": inputs["decoder_input_ids"][-1:, :length],
        "use_cache": False,
    }
    stock.set_attn_implementation("eager")  # type: ignore[operator]
    close(patched(**given).logits, stock(**given).logits)


def test_spectrograms_keep_the_rows_that_convolutions_reach() -> None:
    """SpeechT5's decoder is not packed: its postnet mixes neighbouring frames."""
    config, _ = _harness.tiny(CASES["speecht5"])
    settings = copy.deepcopy(config.config)
    settings.update({"num_mel_bins": 6, "reduction_factor": 1, "speech_decoder_prenet_units": 8})
    settings.update({"speech_decoder_postnet_units": 8, "speaker_embedding_dim": 4})
    stock = transformers.SpeechT5ForTextToSpeech(settings).eval()
    _harness.strong_weights(stock)
    stock = stock.double()
    patched = copy.deepcopy(stock)
    mmfast.patch(patched)
    text = CASES["bart"].inputs(CASES["bart"].build("tiny"), "tiny")
    frames = torch.randn(3, 9, 6, dtype=torch.float64)
    mask = (torch.arange(9) < torch.tensor([9, 6, 4])[:, None]).long()
    given = {
        "input_ids": text["input_ids"] % settings.vocab_size,
        "attention_mask": text["attention_mask"],
        "decoder_input_values": frames,
        "decoder_attention_mask": mask,
        "speaker_embeddings": torch.randn(3, 4, dtype=torch.float64),
        "use_cache": False,
    }
    results = []
    for model in (stock, patched):
        torch.manual_seed(0)  # its prenet drops values in evaluation too
        with _harness.counted():
            results.append(model(**given).spectrogram)
    close(results[1][mask.bool()], results[0][mask.bool()])


def test_checkpoints_of_layers_that_share_a_bias() -> None:
    """The stock T5 makes zeros of its own for them, in the shape of the rows that it sees."""
    _, patched, inputs = both("t5")
    for module in patched.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    patched.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            patched.gradient_checkpointing_enable()  # type: ignore[operator]
        with torch.enable_grad(), _harness.counted():
            gradients.append(_harness.run(patched, inputs, CASES["t5"])[1])
    for name, value in gradients[0].items():
        close(gradients[1][name], value)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_scores_of_distances(length: int) -> None:
    """Against the gather that is written down."""
    from mmfast.integrations.adapters.speech import _of_distances

    query = torch.randn(2, 3, length, 4, dtype=torch.float64)
    distances = torch.randn(3, 2 * length - 1, 4, dtype=torch.float64)
    place = torch.arange(length)
    index = length - 1 - place[:, None] + place
    expected = torch.einsum("bhnd,hnmd->bhnm", query, distances[:, index])
    close(_of_distances(query, distances), expected)
