"""Models that give masks: MaskFormer and what came after it, and Segment Anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.testing.architectures._case import Size, architecture
from mmfast.testing.architectures._pictures import named, padded_pictures, pictures

Config = Any  # of transformers, which is imported where a model is built


def swin(size: Size) -> Config:
    """Swin-T, or four stages of one layer: the pixel decoders read all four."""
    from transformers import SwinConfig

    outs = ["stage1", "stage2", "stage3", "stage4"]
    if size == "base":
        return SwinConfig(depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_features=outs)
    return SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        mlp_ratio=2.0,
        out_features=outs,
    )


class Segmenter:
    """What the cases have in common."""

    @staticmethod
    def inputs(model: nn.Module, size: Size) -> dict[str, Any]:
        height, width = (64, 96) if size == "tiny" else (512, 512)
        return dict(padded_pictures(height, width, seed=1))

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return named(result, "class_queries_logits", "masks_queries_logits")


@architecture("maskformer", calls=4)
class MaskFormer(Segmenter):
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation

        decoder = DetrConfig(
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=2,
            encoder_attention_heads=2,
            decoder_ffn_dim=64,
            num_queries=7,
            use_timm_backbone=False,
        )
        config = MaskFormerConfig(
            backbone_config=swin(size),
            decoder_config=decoder,
            fpn_feature_size=32,
            mask_feature_size=32,
        )
        return MaskFormerForInstanceSegmentation(config)


@architecture("mask2former", calls=10)
class Mask2Former(Segmenter):
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

        config = Mask2FormerConfig(
            backbone_config=swin(size),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=64,
            encoder_layers=2,
            decoder_layers=4,
            num_attention_heads=4,
            dim_feedforward=64,
            num_queries=7,
        )
        return Mask2FormerForUniversalSegmentation(config)


@architecture("oneformer", calls=14)
class OneFormer(Segmenter):
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import OneFormerConfig, OneFormerForUniversalSegmentation

        config = OneFormerConfig(
            backbone_config=swin(size),
            num_queries=7,
            conv_dim=32,
            mask_dim=32,
            hidden_dim=32,
            encoder_feedforward_dim=64,
            encoder_layers=2,
            decoder_layers=4,
            num_attention_heads=4,
            dim_feedforward=64,
            query_dec_layers=2,
            task_seq_len=12,
            text_encoder_width=32,
            text_encoder_context_length=12,
            text_encoder_num_layers=1,
            text_encoder_vocab_size=99,
            text_encoder_n_ctx=2,
        )
        return OneFormerForUniversalSegmentation(config)

    @staticmethod
    def inputs(model: nn.Module, size: Size) -> dict[str, Any]:
        task = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(5))
        return {**Segmenter.inputs(model, size), "task_inputs": task}


def prompts(side: int) -> dict[str, Tensor]:
    """Two pictures, two objects each, shown by two or one points (label -10 is padding)."""
    points = torch.rand(2, 2, 2, 2, generator=torch.Generator().manual_seed(5)) * side
    labels = torch.tensor([[[1, 0], [1, -10]], [[1, 1], [0, -10]]])
    return {
        "pixel_values": pictures(2, side, side),
        "input_points": points,
        "input_labels": labels,
    }


@architecture("sam", calls=9, sizes=("tiny", "base"))
class Sam:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import SamConfig, SamModel

        if size == "base":
            return SamModel(SamConfig())
        vision = {
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 3,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
            "mlp_dim": 64,
        }
        prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
        decoder = {
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        }
        config = SamConfig(
            vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
        )
        return SamModel(config)

    @staticmethod
    def inputs(model: nn.Module, size: Size) -> dict[str, Any]:
        return dict(prompts(64 if size == "tiny" else 1024))

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return named(result, "iou_scores", "pred_masks")


@architecture("sam2", calls=12)
class Sam2:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import Sam2Config, Sam2Model

        backbone = {
            "hidden_size": 16,
            "num_attention_heads": 1,
            "image_size": [64, 64],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [16, 32, 64, 128],
            "num_attention_heads_per_stage": [1, 2, 4, 8],
            "window_size_per_stage": [4, 2, 4, 2],
            "window_positional_embedding_background_size": [4, 4],
            "global_attention_blocks": [3],
        }
        config = Sam2Config(
            vision_config={
                "backbone_config": {"model_type": "sam2_hiera_det_model", **backbone},
                "backbone_channel_list": [128, 64, 32, 16],
                "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
                "fpn_hidden_size": 32,
            },
            prompt_encoder_config={
                "hidden_size": 32,
                "image_size": 64,
                "patch_size": 16,
                "mask_input_channels": 4,
            },
            mask_decoder_config={
                "hidden_size": 32,
                "mlp_dim": 32,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        )
        return Sam2Model(config)

    @staticmethod
    def inputs(model: nn.Module, size: Size) -> dict[str, Any]:
        return dict(prompts(64))

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return named(result, "iou_scores", "pred_masks")
