"""Decoders that read image tokens: idefics2, idefics3, aria, chameleon, janus, llava, paligemma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.testing.architectures._case import Size, architecture, ragged_mask
from mmfast.testing.architectures._tokens import logits_of_tokens, token_ids, with_images

_GENERATE = {"max_new_tokens": 4, "do_sample": False}
_TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
_IMAGE = 95
"""The token that stands for a piece of an image."""


def _batch(count: int, pixels: Tensor, side: Any, length: int = 24) -> dict[str, Any]:
    """Three texts, the shortest of a fifth of `length`, with `count` image tokens each."""
    mask = ragged_mask(3, length, side=side)
    ids = with_images(token_ids(mask, _IMAGE), mask, _IMAGE, count)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


class _LeftPadded:
    """generate() starts from the same batch with its padding on the left."""

    inputs: Any
    prompt: Any
    outputs = staticmethod(logits_of_tokens)

    def __init_subclass__(cls) -> None:
        cls.prompt = staticmethod(lambda model: cls.inputs(model, "tiny", "left"))


def _pixel_mask(batch: int, size: int) -> Tensor:
    """`[batch, size, size]`: a whole image, then ever smaller ones in its upper left corner."""
    mask = torch.zeros(batch, size, size, dtype=torch.bool)
    for item in range(batch):
        mask[item, : size - 4 * item, : size - 4 * item] = True
    return mask


def _letters(code: int) -> str:
    """A number as Chameleon's vocabulary spells it: A for 0 to J for 9."""
    return "".join(chr(ord("A") + int(digit)) for digit in str(code))


@architecture("idefics2", calls=6, packed=4, generate=_GENERATE)
class Idefics2(_LeftPadded):
    """Images of three sizes in one batch: the vision encoder has padding of its own."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 vision layers, a resampler of 2, 2 layers of Mistral."""
        from transformers import Idefics2Config, Idefics2ForConditionalGeneration

        config = Idefics2Config(
            text_config={"model_type": "mistral", **_TEXT},
            vision_config=_VISION,
            perceiver_config={
                "hidden_size": 64, "resampler_n_latents": 3, "resampler_depth": 2,
                "resampler_n_heads": 2, "resampler_head_dim": 16, "num_key_value_heads": 1,
            },
            image_token_id=_IMAGE,
        )  # fmt: skip
        return Idefics2ForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """One image an item, of 16, 12 and 8 pixels."""
        pixels = _pixel_mask(3, 16)[:, None]
        images = torch.randn(3, 1, 3, 16, 16) * pixels[:, :, None]
        return {**_batch(3, images, side), "pixel_attention_mask": pixels}


@architecture("idefics3", calls=4, packed=2, generate=_GENERATE)
class Idefics3(_LeftPadded):
    """A pixel shuffle in place of idefics2's resampler: it reads the padding of images."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 vision layers, 2 layers of Llama."""
        from transformers import Idefics3Config, Idefics3ForConditionalGeneration

        config = Idefics3Config(
            text_config={"model_type": "llama", **_TEXT}, vision_config=_VISION,
            image_token_id=_IMAGE, scale_factor=2,
        )  # fmt: skip
        config.text_config.pad_token_id = 0
        return Idefics3ForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """One image an item, of 16, 12 and 8 pixels, that becomes 4 tokens."""
        pixels = _pixel_mask(3, 16)[:, None]
        images = torch.randn(3, 1, 3, 16, 16) * pixels[:, :, None]
        return {**_batch(4, images, side), "pixel_attention_mask": pixels}


@architecture("aria", calls=5, packed=2, generate=_GENERATE)
class Aria(_LeftPadded):
    """Experts in the decoder; the projector's nn.MultiheadAttention reads a padded image."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 vision layers, a projector, 2 layers with 4 experts each."""
        from transformers import AriaConfig, AriaForConditionalGeneration

        config = AriaConfig(
            text_config={
                **_TEXT, "model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2,
                "moe_num_shared_experts": 1,
            },
            vision_config={"model_type": "idefics3_vision", **_VISION},
            projector_patch_to_query_dict={16: 4}, image_token_index=_IMAGE,
        )  # fmt: skip
        model = AriaForConditionalGeneration(config)
        model.set_experts_implementation("eager")  # the default's grouped matmul has no float64
        return model

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """One image an item, of 16, 12 and 8 pixels, that becomes 4 tokens."""
        pixels = _pixel_mask(3, 16)
        images = torch.randn(3, 3, 16, 16) * pixels[:, None]
        return {**_batch(4, images, side), "pixel_mask": pixels}


@architecture("chameleon", calls=2, packed=2, generate=_GENERATE)
class Chameleon(_LeftPadded):
    """Images become tokens of the vocabulary; norms over heads."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 layers with the norms behind the sublayers, and a small VQ-VAE."""
        from transformers import ChameleonConfig, ChameleonForConditionalGeneration

        names = {f"IMGIMG{_letters(code)}Z": 60 + code for code in range(16)}
        config = ChameleonConfig(
            **_TEXT, swin_norm=True, vocabulary_map={**names, "<image>": _IMAGE},
            vq_config={
                "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "resolution": 4,
                "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
            },
        )  # fmt: skip
        model = ChameleonForConditionalGeneration(config)
        model.model.vqmodel.requires_grad_(False)  # gives indices, which have no gradient
        return model

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """One image an item of 2 x 2 codes."""
        return _batch(4, torch.randn(3, 3, 4, 4), side)

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Logits of words: those of images are the lowest number there is."""
        return {"logits": logits_of_tokens(result, inputs)["logits"][:, :60]}


@architecture("janus", calls=4, packed=2, generate={**_GENERATE, "generation_mode": "text"})
class Janus(_LeftPadded):
    """A vision encoder before a Llama; generate() writes text."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 vision layers, 2 layers of Llama; the image generator is there but takes no part."""
        from transformers import JanusConfig, JanusForConditionalGeneration

        config = JanusConfig(
            text_config={"model_type": "llama", **_TEXT},
            vision_config={
                **_VISION, "image_size": 8, "mlp_ratio": 2.0, "projection_dim": 64,
                "depth": 2, "num_image_tokens": 4,
            },
            vq_config={
                "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32,
                "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 64,
                "image_token_embed_dim": 64, "num_patches": 4,
            },
            image_token_id=_IMAGE,
        )  # fmt: skip
        model = JanusForConditionalGeneration(config)
        for name, part in model.model.named_children():
            part.requires_grad_(name in ("vision_model", "aligner", "language_model"))
        return model

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """One image an item of 4 patches."""
        return _batch(4, torch.randn(3, 3, 8, 8), side)


@architecture("llava", calls=4, packed=2, generate=_GENERATE)
class Llava(_LeftPadded):
    """CLIP's vision encoder before a Llama."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """3 vision layers, the last of which is not read, and 2 layers of Llama."""
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        config = LlavaConfig(
            text_config={"model_type": "llama", **_TEXT},
            vision_config={
                "model_type": "clip_vision_model", **_VISION, "image_size": 8,
                "num_hidden_layers": 2, "projection_dim": 32,
            },
            image_token_index=_IMAGE, vision_feature_layer=-1,
        )  # fmt: skip
        return LlavaForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """One image an item of 4 patches."""
        return _batch(4, torch.randn(3, 3, 8, 8), side)


@architecture("paligemma", calls=4, packed=2, generate=_GENERATE)
class PaliGemma(_LeftPadded):
    """A prefix that sees all of itself when generate() reads it: that mask is not packed."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 layers of Siglip, 2 of Gemma."""
        from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

        config = PaliGemmaConfig(
            text_config={"model_type": "gemma", **_TEXT, "head_dim": 16},
            vision_config={
                "model_type": "siglip_vision_model", **_VISION, "image_size": 8,
                "vision_use_head": False,
            },
            image_token_index=_IMAGE, projection_dim=64, hidden_size=64,
        )  # fmt: skip
        return PaliGemmaForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """One image an item of 4 patches."""
        batch = _batch(4, torch.randn(3, 3, 8, 8), side)
        return {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
