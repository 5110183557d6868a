"""Decoders with gated cross-attention: mllama, idefics, evolla."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmfast.testing.architectures._case import Size, architecture, ragged_mask
from mmfast.testing.architectures._tokens import logits_of_tokens, token_ids

_GENERATE = {"max_new_tokens": 4, "do_sample": False}


@architecture("mllama", calls=8, packed=4, generate=_GENERATE)
class Mllama:
    """Tiles of an image, two of the four absent in one item; text before and after its image."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 local and 2 global vision layers; 4 text layers, the second and last cross."""
        from transformers import MllamaConfig, MllamaForConditionalGeneration

        text = {
            "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3],
            "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }  # fmt: skip
        vision = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_global_layers": 2, "attention_heads": 2, "image_size": 16, "patch_size": 8,
            "max_num_tiles": 4, "intermediate_layers_indices": [0, 1], "vision_output_dim": 96,
        }  # fmt: skip
        config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=96)
        return MllamaForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """20 tokens, right padding; the image token is the third of each text."""
        mask = ragged_mask(3, 20, side=side)
        ids = token_ids(mask, 96)
        start = mask.argmax(1)
        ids[torch.arange(3), start + 2] = 96
        tiles = torch.ones(3, 1, 4, dtype=torch.long)
        tiles[1, 0, 2:] = 0
        seen = (torch.arange(20) >= (start + 2)[:, None]) & (mask == 1)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": torch.randn(3, 1, 4, 3, 16, 16),
            "aspect_ratio_ids": torch.tensor([[6], [2], [6]]),
            "aspect_ratio_mask": tiles,
            "cross_attention_mask": (seen[:, :, None, None] * tiles[:, None]).long(),
        }

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        """The same with left padding."""
        return Mllama.inputs(model, "tiny", "left")

    outputs = staticmethod(logits_of_tokens)


@architecture("idefics", calls=8, packed=4, generate=_GENERATE)
class Idefics:
    """Two images an item through a resampler; tokens before the first image see none."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 vision layers, a resampler of 2, 2 gated cross layers and 2 text layers."""
        from transformers import IdeficsConfig, IdeficsForVisionText2Text

        config = IdeficsConfig(
            vocab_size=96, additional_vocab_size=4, hidden_size=64, intermediate_size=96,
            num_hidden_layers=2, num_attention_heads=4, cross_layer_interval=1,
            alpha_type="vector", qk_layer_norms=True, use_resampler=True,
            freeze_text_layers=False, freeze_vision_layers=False, eos_token_id=None,
            vision_config={
                "embed_dim": 32, "image_size": 16, "patch_size": 8, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 2,
            },
            perceiver_config={
                "use_resampler": True, "resampler_n_latents": 3, "resampler_depth": 2,
                "resampler_n_heads": 2, "resampler_head_dim": 16,
                "qk_layer_norms_perceiver": True,
            },
        )  # fmt: skip
        return IdeficsForVisionText2Text(config)

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """18 tokens; the first image is seen from the third token on, the second from the sixth."""
        mask = ragged_mask(3, 18, side=side)
        position = torch.arange(18) - mask.argmax(1)[:, None]
        seen = torch.stack((position >= 2, position >= 5), -1) & (mask == 1)[:, :, None]
        return {
            "input_ids": token_ids(mask, 100),
            "attention_mask": mask,
            "pixel_values": torch.randn(3, 2, 3, 16, 16),
            "image_attention_mask": seen.long(),
        }

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        """The same with left padding."""
        return Idefics.inputs(model, "tiny", "left")

    outputs = staticmethod(logits_of_tokens)


@architecture("evolla", calls=8, packed=4, generate=_GENERATE)
class Evolla:
    """Proteins of several lengths through a resampler into the decoder's aligners; no cache."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 protein layers, a resampler of 2, 2 text layers with an aligner each."""
        from transformers import EvollaConfig, EvollaForProteinText2Text

        config = EvollaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, aligner_num_add_layers=2,
            aligner_ffn_mult=2, resampler_depth=2, resampler_dim_head=16, resampler_heads=2,
            resampler_num_latents=5, resampler_ff_mult=2, max_position_embeddings=128,
            pad_token_id=0, bos_token_id=1, eos_token_id=None,
            protein_encoder_config={
                "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "intermediate_size": 64, "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64,
            },
        )  # fmt: skip
        return EvollaForProteinText2Text(config)

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """18 tokens of text, 24 of protein, both with right padding."""
        mask, protein = ragged_mask(3, 18, side=side), ragged_mask(3, 24).flip(0)
        return {
            "input_ids": token_ids(mask, 96),
            "attention_mask": mask,
            "protein_input_ids": torch.where(protein == 1, token_ids(protein, 40), 1),
            "protein_attention_mask": protein,
        }

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        """The same with the text's padding on the left."""
        return Evolla.inputs(model, "tiny", "left")

    outputs = staticmethod(logits_of_tokens)
