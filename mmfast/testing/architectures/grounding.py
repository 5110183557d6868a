"""Detectors of what a text names: pictures and text of different sizes, both padded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.testing.architectures._case import Size, architecture, ragged_mask
from mmfast.testing.architectures._pictures import named, padded_pictures, pictures

BERT_SPECIAL = (101, 102, 1012, 1029)
"""[CLS], [SEP], "." and "?" of BERT: the models split their text into phrases at these."""

SMALL_BERT = {
    "vocab_size": 1100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
SMALL_SWIN = {
    "image_size": 64,
    "embed_dim": 16,
    "depths": [1, 1, 1],
    "num_heads": [2, 2, 2],
    "window_size": 4,
    "mlp_ratio": 2.0,
}


def phrases(mask: Tensor, vocabulary: int) -> Tensor:
    """`[B, N]` int64: [CLS], phrases of three words ended by ".", [SEP], and 0 in padding."""
    cls, sep, stop, _ = BERT_SPECIAL
    words = torch.randint(
        103, min(vocabulary, 1012), mask.shape, generator=torch.Generator().manual_seed(5)
    )
    words[:, 4::4] = stop
    words[:, 0] = cls
    for row, length in zip(words, mask.sum(1).tolist(), strict=True):
        row[length - 1] = sep
    return words * mask


def grounding_inputs(model: nn.Module, size: Size) -> dict[str, Any]:
    """Padded pictures and padded text."""
    height, width, length = (64, 96, 20) if size == "tiny" else (640, 832, 48)
    mask = ragged_mask(3, length)
    vocabulary: int = model.config.text_config.vocab_size  # type: ignore[union-attr, assignment]
    text = {"input_ids": phrases(mask, vocabulary), "attention_mask": mask}
    return {**padded_pictures(height, width), **text}


def grounding_config(size: Size) -> dict[str, Any]:
    """Arguments of the config of Grounding DINO and of MM Grounding DINO."""
    from transformers import BertConfig, SwinConfig

    if size == "base":
        outs = ["stage2", "stage3", "stage4"]
        swin = SwinConfig(depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_features=outs)
        return {"backbone_config": swin, "text_config": BertConfig(), "use_timm_backbone": False}
    return {
        "backbone_config": SwinConfig(**SMALL_SWIN, out_features=["stage2", "stage3"]),
        "text_config": BertConfig(**SMALL_BERT),
        "use_timm_backbone": False,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_queries": 7,
        "num_feature_levels": 3,
        "max_text_len": 20,
    }


def seen_outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The boxes, and the similarity of each query with each token that is not padding."""
    tokens = inputs["attention_mask"].bool()
    logits = result.logits[..., : tokens.shape[1]].transpose(1, 2)
    return {"logits": logits[tokens], **named(result, "pred_boxes")}


@architecture("grounding_dino", calls=15, packed=2, sizes=("tiny", "base"))
class GroundingDino:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

        return GroundingDinoForObjectDetection(GroundingDinoConfig(**grounding_config(size)))

    inputs = staticmethod(grounding_inputs)
    outputs = staticmethod(seen_outputs)


@architecture("mm_grounding_dino", calls=15, packed=2)
class MMGroundingDino:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import MMGroundingDinoConfig, MMGroundingDinoForObjectDetection

        return MMGroundingDinoForObjectDetection(MMGroundingDinoConfig(**grounding_config(size)))

    inputs = staticmethod(grounding_inputs)
    outputs = staticmethod(seen_outputs)


def forget_texts(model: Any, arguments: Any) -> None:
    """What OmDet-Turbo keeps of texts belongs to the graph of the forward that it is of."""
    for kept in (model.language_cache_class, model.language_cache_prompt):
        kept.cache.clear()
        kept.current_load = 0


@architecture("omdet_turbo", calls=10)
class OmDetTurbo:
    """Classes and task in text, padded; the pictures all have one size."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import (
            CLIPTextConfig,
            OmDetTurboConfig,
            OmDetTurboForObjectDetection,
            SwinConfig,
        )

        text = CLIPTextConfig(
            vocab_size=99,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=48,
            max_position_embeddings=16,
        )
        config = OmDetTurboConfig(
            text_config=text,
            backbone_config=SwinConfig(**SMALL_SWIN, out_features=["stage1", "stage2", "stage3"]),
            use_timm_backbone=False,
            image_size=64,
            apply_layernorm_after_vision_backbone=False,
            text_projection_in_dim=48,
            text_projection_out_dim=48,
            task_encoder_hidden_dim=40,
            class_embed_dim=48,
            num_queries=7,
            encoder_hidden_dim=32,
            vision_features_channels=[32, 32, 32],
            encoder_in_channels=[16, 32, 64],
            encoder_attention_heads=2,
            encoder_dim_feedforward=64,
            decoder_hidden_dim=32,
            decoder_num_heads=2,
            decoder_num_layers=2,
            decoder_dim_feedforward=64,
        )
        model = OmDetTurboForObjectDetection(config)
        model.register_forward_pre_hook(forget_texts)
        return model

    @staticmethod
    def inputs(model: nn.Module, size: Size) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(5)
        counts = torch.tensor([3, 1, 2])  # classes asked for of each picture
        classes, tasks = ragged_mask(6, 10), ragged_mask(3, 12)

        def words(mask: Tensor) -> Tensor:
            return torch.randint(3, 90, mask.shape, generator=generator) * mask

        return {
            "pixel_values": pictures(3, 64, 64),
            "classes_input_ids": words(classes),
            "classes_attention_mask": classes,
            "classes_structure": counts,
            "tasks_input_ids": words(tasks),
            "tasks_attention_mask": tasks,
        }

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return named(result, "decoder_coord_logits", "decoder_class_logits")
