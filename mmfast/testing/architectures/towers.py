"""More models of two towers, and towers by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.testing.architectures._case import Size, architecture, ragged_mask
from mmfast.testing.architectures.contrastive import (
    TEXT,
    VISION,
    WORDS,
    pictures,
    sentences,
    text_and_pictures,
    two_towers,
    valid_rows,
)

_BERT: dict[str, Any] = TEXT | {
    "type_vocab_size": 2,
    "max_position_embeddings": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@architecture("siglip2", calls=5, packed=2, sizes=("tiny", "base"))
class Siglip2:
    """google/siglip2-base-patch16-naflex: pictures of several sizes, padded patches.

    The sentences have no mask, as the model was trained: it pools the last token.
    """

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import Siglip2Config, Siglip2Model

        if size == "base":
            return Siglip2Model(Siglip2Config())
        text = TEXT | {"projection_size": 48}
        vision = {name: VISION[name] for name in VISION if name != "image_size"} | {
            "num_patches": 16
        }
        return Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        if size == "base":
            heights, widths, length, words = [16, 14, 12, 10, 8, 7, 6, 4], 16, 64, 32000
        else:
            heights, widths, length, words = [5, 3, 2], 4, 12, WORDS - 2
        batch, patch = len(heights), 16 if size == "base" else 4
        shapes = torch.tensor([[height, widths] for height in heights])
        counts = shapes.prod(1)
        patches = torch.randn(
            batch,
            int(counts.max()),
            3 * patch**2,
            generator=torch.Generator().manual_seed(7),
        )
        return {
            "input_ids": sentences(ragged_mask(batch, length), words=words),
            "pixel_values": patches,
            "pixel_attention_mask": (torch.arange(int(counts.max())) < counts[:, None]).long(),
            "spatial_shapes": shapes,
        }

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        picture = result.vision_model_output.last_hidden_state
        return {
            "logits": result.logits_per_image,
            "text": result.text_model_output.last_hidden_state,
            "picture": valid_rows(picture, inputs, "pixel_attention_mask"),
        }


@architecture("altclip", calls=4, packed=2, sizes=("tiny", "base"))
class AltClip:
    """BAAI/AltCLIP: XLM-RoBERTa reads the text."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import AltCLIPConfig, AltCLIPModel

        if size == "base":
            return AltCLIPModel(AltCLIPConfig())
        text = _BERT | {"project_dim": 24}
        config = AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
        return AltCLIPModel(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        if size == "base":
            return text_and_pictures(model, 77, 4, words=250000, begin=0, end=2)
        return text_and_pictures(model, 20, 3)

    outputs = staticmethod(two_towers)


@architecture("chinese_clip", calls=4, packed=2, sizes=("tiny", "base"))
class ChineseClip:
    """OFA-Sys/chinese-clip-vit-base-patch16: BERT reads the text."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import ChineseCLIPConfig, ChineseCLIPModel

        if size == "base":
            return ChineseCLIPModel(ChineseCLIPConfig())
        text = _BERT | {"pad_token_id": 0}
        config = ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
        return ChineseCLIPModel(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        if size == "base":
            return text_and_pictures(model, 52, 8, words=21000, begin=101, end=102, pad=0)
        return text_and_pictures(model, 20, 3, pad=0)

    outputs = staticmethod(two_towers)


@architecture("xclip", calls=9, packed=2)
class XClip:
    """microsoft/xclip-base-patch32: frames of a film, and prompts that read them."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import XCLIPConfig, XCLIPModel

        vision = VISION | {
            "num_frames": 2,
            "mit_hidden_size": 24,
            "mit_intermediate_size": 48,
            "mit_num_hidden_layers": 1,
            "mit_num_attention_heads": 4,
        }
        config = XCLIPConfig(
            text_config=TEXT,
            vision_config=vision,
            projection_dim=24,
            prompt_layers=2,
            prompt_num_attention_heads=4,
        )
        return XCLIPModel(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        inputs = text_and_pictures(model, 20, 3)
        inputs["pixel_values"] = pictures(6, 16).unflatten(0, (3, 2))
        return inputs

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            "logits": result.logits_per_video,
            "text": valid_rows(result.text_model_output.last_hidden_state, inputs),
            "film": result.mit_output.last_hidden_state,
        }


@architecture("groupvit", calls=6, packed=2)
class GroupViT:
    """nvidia/groupvit-gcc-yfcc: tokens of groups gather those of patches, stage by stage."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import GroupViTConfig, GroupViTModel

        vision = VISION | {
            "num_hidden_layers": 2,
            "depths": [1, 1],
            "num_group_tokens": [8, 4],
            "num_output_groups": [8, 4],
        }
        config = GroupViTConfig(
            text_config=TEXT,
            vision_config=vision,
            projection_dim=24,
            projection_intermediate_dim=32,
        )
        return GroupViTModel(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return text_and_pictures(model, 20, 3)

    outputs = staticmethod(two_towers)


@architecture("xlm-roberta", calls=2, packed=2, sizes=("tiny", "base"))
class XlmRoberta:
    """FacebookAI/xlm-roberta-base."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

        if size == "base":
            config = XLMRobertaConfig(
                vocab_size=250002, max_position_embeddings=514, type_vocab_size=1
            )
            return XLMRobertaForSequenceClassification(config)
        return XLMRobertaForSequenceClassification(XLMRobertaConfig(**_BERT))

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        base = size == "base"
        mask = ragged_mask(8, 256) if base else ragged_mask(3, 20)
        return {"input_ids": sentences(mask), "attention_mask": mask}

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"logits": result.logits}


def _picture_inputs(model: Any, size: Size) -> dict[str, Any]:
    return {"pixel_values": pictures(3, model.config.image_size)}


def _picture_outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"logits": result.logits}


@architecture("vit", calls=2)
class Vit:
    """google/vit-base-patch16-224."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        return ViTForImageClassification(ViTConfig(**VISION))

    inputs = staticmethod(_picture_inputs)
    outputs = staticmethod(_picture_outputs)


@architecture("deit", calls=2)
class Deit:
    """facebook/deit-base-distilled-patch16-224."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

        return DeiTForImageClassificationWithTeacher(DeiTConfig(**VISION))

    inputs = staticmethod(_picture_inputs)
    outputs = staticmethod(_picture_outputs)


@architecture("dinov2", calls=2, without_gradient=("mask_token",))
class Dinov2:
    """facebook/dinov2-base: layer scale and, in the giant, SwiGLU."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import Dinov2Config, Dinov2ForImageClassification

        vision = {name: VISION[name] for name in VISION if name != "intermediate_size"}
        config = Dinov2Config(**vision, mlp_ratio=2, use_swiglu_ffn=True, layerscale_value=0.7)
        return Dinov2ForImageClassification(config)

    inputs = staticmethod(_picture_inputs)
    outputs = staticmethod(_picture_outputs)
