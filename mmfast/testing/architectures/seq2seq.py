"""Encoder-decoders over text and documents: BART and its kin, T5 and its kin, Pix2Struct."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.testing.architectures._case import Size, architecture, ragged_mask

_TOKENS = {"tiny": (20, 12), "base": (256, 128)}  # of the encoder and of the decoder
_BATCH = {"tiny": 3, "base": 4}


def text(mask: Tensor, vocabulary: int, *, seed: int = 0, pad: int = 1) -> Tensor:
    """Random ids below `vocabulary` (none of the first four), `pad` where the mask is 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocabulary, mask.shape, generator=generator)
    return ids.masked_fill(mask == 0, pad)


def valid_rows(rows: Tensor, mask: Tensor) -> Tensor:
    """`[tokens, ...]` of `[B, N, ...]`: the rows that are no padding."""
    return rows[mask.bool()]


def seq2seq_inputs(size: Size, vocabulary: int, pad: int = 1) -> dict[str, Any]:
    """A padded source and a padded target; their lengths are in opposite order."""
    source, target = (ragged_mask(_BATCH[size], length) for length in _TOKENS[size])
    target = target.flip(0)
    return {
        "input_ids": text(source, vocabulary, seed=1, pad=pad),
        "attention_mask": source,
        "decoder_input_ids": text(target, vocabulary, seed=2, pad=pad),
        "decoder_attention_mask": target,
        "use_cache": False,
    }


def seq2seq_outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        "logits": valid_rows(result.logits, inputs["decoder_attention_mask"]),
        "encoder": valid_rows(result.encoder_last_hidden_state, inputs["attention_mask"]),
    }


def source_prompt(model: Any) -> dict[str, Any]:
    """What generate() of a text encoder-decoder starts from."""
    inputs = seq2seq_inputs("tiny", 99, pad=model.config.pad_token_id)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


_GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@architecture("bart", sizes=("tiny", "base"), calls=6, packed=4, generate=_GREEDY)
class Bart:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import BartConfig, BartForConditionalGeneration

        if size == "base":  # facebook/bart-base
            config = BartConfig(
                d_model=768,
                encoder_layers=6,
                decoder_layers=6,
                encoder_ffn_dim=3072,
                decoder_ffn_dim=3072,
                encoder_attention_heads=12,
                decoder_attention_heads=12,
            )
        else:
            config = BartConfig(**_bart_like())
        return BartForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return seq2seq_inputs(size, model.config.vocab_size)

    outputs = staticmethod(seq2seq_outputs)
    prompt = staticmethod(source_prompt)


def _bart_like() -> dict[str, Any]:
    return {
        "vocab_size": 99,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
        "max_position_embeddings": 40,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }


def _like_bart(model_type: str, name: str, **more: Any) -> None:
    """A case of a model that is built, fed and read as BART is."""

    class LikeBart:
        @staticmethod
        def build(size: Size) -> nn.Module:
            import transformers

            config = getattr(transformers, name + "Config")(**_bart_like(), **more)
            model: nn.Module = getattr(transformers, name + "ForConditionalGeneration")(config)
            return model

        @staticmethod
        def inputs(model: Any, size: Size) -> dict[str, Any]:
            return seq2seq_inputs(size, model.config.vocab_size, pad=model.config.pad_token_id)

        outputs = staticmethod(seq2seq_outputs)
        prompt = staticmethod(source_prompt)

    architecture(model_type, calls=6, packed=4, generate=_GREEDY)(LikeBart)


_like_bart("mbart", "MBart", scale_embedding=True)
_like_bart("pegasus", "Pegasus")
_like_bart("plbart", "PLBart")
_like_bart("blenderbot", "Blenderbot")
_like_bart("blenderbot_small", "BlenderbotSmall", pad_token_id=0)
_like_bart("m2m_100", "M2M100")


@architecture("marian", calls=6, packed=4, generate=_GREEDY)
class Marian:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import MarianConfig, MarianMTModel

        return MarianMTModel(MarianConfig(**_bart_like(), pad_token_id=1, eos_token_id=0))

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return seq2seq_inputs(size, model.config.vocab_size)

    outputs = staticmethod(seq2seq_outputs)
    prompt = staticmethod(source_prompt)


def _t5_like() -> dict[str, Any]:
    """Few buckets and a short maximal distance, so that a wrong relative bias shows."""
    return {
        "vocab_size": 99,
        "d_model": 32,
        "d_kv": 12,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 14,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }


@architecture("t5", sizes=("tiny", "base"), calls=6, packed=4, generate=_GREEDY)
class T5:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        if size == "base":  # t5-base
            sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
            config = T5Config(**sizes, decoder_start_token_id=0)
        else:
            config = T5Config(**_t5_like(), num_decoder_layers=2, feed_forward_proj="gated-gelu")
        return T5ForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return seq2seq_inputs(size, model.config.vocab_size, pad=0)

    outputs = staticmethod(seq2seq_outputs)
    prompt = staticmethod(source_prompt)


@architecture("mt5", calls=6, packed=4, generate=_GREEDY)
class MT5:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import MT5Config, MT5ForConditionalGeneration

        return MT5ForConditionalGeneration(MT5Config(**_t5_like(), num_decoder_layers=2))

    inputs = T5.inputs
    outputs = staticmethod(seq2seq_outputs)
    prompt = staticmethod(source_prompt)


@architecture(
    "udop",
    calls=6,
    packed=2,
    generate=_GREEDY,
    # The decoder sees neither patches nor boxes.
    without_gradient=(
        "decoder.embed_patches.proj.weight",
        "decoder.embed_patches.proj.bias",
        "decoder.relative_bias.biases.1.relative_attention_bias.weight",
        "decoder.relative_bias.biases.2.relative_attention_bias.weight",
    ),
)
class Udop:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import UdopConfig, UdopForConditionalGeneration

        config = UdopConfig(
            **_t5_like(),
            num_decoder_layers=2,
            image_size=32,
            patch_size=8,
            max_2d_position_embeddings=64,
            # The first shares its table with the first layer, and so must have its buckets.
            relative_bias_args=[
                {"type": "1d", "relative_attention_num_buckets": 8, "max_distance": 14},
                {"type": "horizontal"},
                {"type": "vertical"},
            ],
        )
        return UdopForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        inputs = seq2seq_inputs(size, model.config.vocab_size, pad=0)
        generator = torch.Generator().manual_seed(3)
        shape = inputs["input_ids"].shape
        corners = torch.rand(*shape, 2, generator=generator) * 0.6
        inputs["bbox"] = torch.cat([corners, corners + 0.3], -1)
        inputs["pixel_values"] = torch.randn(shape[0], 3, 32, 32, generator=generator)
        return inputs

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"logits": valid_rows(result.logits, inputs["decoder_attention_mask"])}

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        inputs = Udop.inputs(model, "tiny")
        return {k: inputs[k] for k in ("input_ids", "attention_mask", "bbox", "pixel_values")}


@architecture("pix2struct", sizes=("tiny", "base"), calls=6, packed=4, generate=_GREEDY)
class Pix2Struct:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import Pix2StructConfig, Pix2StructForConditionalGeneration

        if size == "base":  # google/pix2struct-base
            config = Pix2StructConfig()
        else:
            text_config = {
                "vocab_size": 99,
                "hidden_size": 32,
                "d_kv": 8,
                "d_ff": 40,
                "num_layers": 2,
                "num_heads": 4,
                "relative_attention_num_buckets": 8,
                "relative_attention_max_distance": 9,
                "is_decoder": True,
                "decoder_start_token_id": 0,
            }
            vision_config = {
                "hidden_size": 32,
                "patch_embed_hidden_size": 27,
                "d_ff": 40,
                "d_kv": 12,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "seq_len": 32,
            }
            config = Pix2StructConfig(text_config=text_config, vision_config=vision_config)
        return Pix2StructForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        batch, (source, target) = _BATCH[size], _TOKENS[size]
        mask, target_mask = ragged_mask(batch, source), ragged_mask(batch, target).flip(0)
        vision = model.config.vision_config
        generator = torch.Generator().manual_seed(3)
        pixels = torch.randn(batch, source, vision.patch_embed_hidden_size, generator=generator)
        places = torch.arange(source)
        rows_columns = torch.stack([places // 5 + 1, places % 5 + 1], -1).expand(batch, -1, -1)
        patches = torch.cat([rows_columns.to(pixels.dtype), pixels], -1)
        return {
            "flattened_patches": patches * mask[..., None],
            "attention_mask": mask,
            "decoder_input_ids": text(target_mask, model.config.text_config.vocab_size, pad=0),
            "decoder_attention_mask": target_mask,
            "use_cache": False,
        }

    outputs = staticmethod(seq2seq_outputs)

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        inputs = Pix2Struct.inputs(model, "tiny")
        return {name: inputs[name] for name in ("flattened_patches", "attention_mask")}
