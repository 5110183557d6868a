"""Decoders of text, with windows, chunks and experts: llama and its like, gemma3, llama4."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from mmfast.testing.architectures._case import Size, architecture, ragged_mask
from mmfast.testing.architectures._tokens import logits_of_tokens, token_ids, with_images

_GENERATE = {"max_new_tokens": 4, "do_sample": False}
_TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_IMAGE = 95


def _text(side: Any) -> dict[str, Any]:
    mask = ragged_mask(3, 24, side=side)
    return {"input_ids": token_ids(mask, _IMAGE), "attention_mask": mask}


def _image_text(side: Any, size: int) -> dict[str, Any]:
    batch = _text(side)
    batch["input_ids"] = with_images(batch["input_ids"], batch["attention_mask"], _IMAGE, 4)
    return {**batch, "pixel_values": torch.randn(3, 3, size, size)}


class _Text:
    """A decoder of text alone: 2 layers with grouped heads, by the name of its config."""

    build: Any
    config: ClassVar[str]
    more: ClassVar[Mapping[str, Any]] = {}
    outputs = staticmethod(logits_of_tokens)

    def __init_subclass__(cls) -> None:
        cls.build = staticmethod(functools.partial(_text_model, cls.config, cls.more))

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        """Three texts of 24, 14 and 5 tokens."""
        return _text("right")

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        """The same with left padding."""
        return _text("left")


def _text_model(config: str, more: Mapping[str, Any], size: Size) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(**{**_TEXT, **more})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(made)
    return model


@architecture("llama", calls=2, packed=2, generate=_GENERATE)
class Llama(_Text):
    """The decoder that most vision-language models build on."""

    config = "LlamaConfig"


@architecture("mistral", calls=2)
class Mistral(_Text):
    """Windows of 8: the masks are not causal, so that nothing is packed."""

    config = "MistralConfig"
    more: ClassVar = {"sliding_window": 8}


@architecture("gemma", calls=2, packed=2)
class Gemma(_Text):
    """Norms that scale by one more than their weight, and a gate of the tanh GELU."""

    config = "GemmaConfig"


@architecture("phi3", calls=2, packed=2)
class Phi3(_Text):
    """One projection to queries, keys and values, and one to both halves of the MLP."""

    config = "Phi3Config"
    more: ClassVar = {"sliding_window": None}


@architecture("qwen2", calls=2, packed=2)
class Qwen2(_Text):
    """Biases on queries, keys and values."""

    config = "Qwen2Config"


@architecture("qwen3", calls=2, packed=2)
class Qwen3(_Text):
    """Norms on queries and keys."""

    config = "Qwen3Config"


@architecture("gemma3", calls=4, packed=1, generate=_GENERATE)
class Gemma3:
    """A layer with a window of 8 and one without; text alone sees causally, with the images there.

    Images that see all of themselves (`token_type_ids`) are the case gemma3_images.
    """

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 layers of Siglip, 2 of Gemma 3."""
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration

        config = Gemma3Config(
            text_config={
                **_TEXT, "sliding_window": 8, "query_pre_attn_scalar": 16,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            vision_config={
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
                "vision_use_head": False,
            },
            mm_tokens_per_image=4, image_token_index=_IMAGE, boi_token_index=93,
            eoi_token_index=94,
        )  # fmt: skip
        return Gemma3ForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """One image an item, of 4 tokens."""
        return _image_text(side, 16)

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        """The same with left padding."""
        return _image_text("left", 16)

    outputs = staticmethod(logits_of_tokens)


@architecture("gemma3_images", calls=4, generate=_GENERATE)
class Gemma3Images:
    """Gemma 3 whose images see all of themselves: neither layer's mask is causal."""

    build = staticmethod(Gemma3.build)
    outputs = staticmethod(logits_of_tokens)

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """As gemma3, with the pieces of images marked."""
        batch = _image_text(side, 16)
        return {**batch, "token_type_ids": (batch["input_ids"] == _IMAGE).long()}

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        """The same with left padding."""
        return Gemma3Images.inputs(model, "tiny", "left")


@architecture("llama4", calls=6, packed=2, generate=_GENERATE)
class Llama4:
    """Chunks of 8, complex rotations, experts, a layer whose queries grow with their position."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 vision layers; layers with chunks, without, and without rotation."""
        from transformers import Llama4Config, Llama4ForConditionalGeneration

        config = Llama4Config(
            text_config={
                **_TEXT, "num_hidden_layers": 4, "intermediate_size_mlp": 96,
                "num_local_experts": 4, "moe_layers": [1], "attention_chunk_size": 8,
                "no_rope_layers": [1, 1, 1, 0], "floor_scale": 4,
                "layer_types": [
                    "chunked_attention", "full_attention", "full_attention", "full_attention",
                ],
            },
            vision_config={
                "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
                "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
            },
            image_token_index=_IMAGE, boi_token_index=93, eoi_token_index=94,
        )  # fmt: skip
        return Llama4ForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """One image an item, of 4 tokens."""
        return _image_text(side, 16)

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        """The same with left padding."""
        return _image_text("left", 16)

    outputs = staticmethod(logits_of_tokens)
