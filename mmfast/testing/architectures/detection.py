"""Detectors of objects: DETR and what came after it, on padded pictures.

What they are compared by are the queries' answers: a padded pixel is nobody's key, so that what
the encoder says of it matters to none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmfast.testing.architectures._case import Size, architecture
from mmfast.testing.architectures._pictures import named, padded_pictures, pictures

Config = Any  # of transformers, which is imported where a model is built

SMALL = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 7,
    "use_timm_backbone": False,
}


def resnet(size: Size, levels: int = 1) -> Config:
    """A ResNet: 50 layers deep, or two stages; the last `levels` stages are its outputs."""
    from transformers import ResNetConfig

    stages = 4 if size == "base" else max(3, levels)
    outs = [f"stage{stage}" for stage in range(stages - levels + 1, stages + 1)]
    if size == "base":
        return ResNetConfig(out_features=outs)
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16][:stages],
        depths=[1] * stages,
        layer_type="basic",
        downsample_in_first_stage=False,
        out_features=outs,
    )


def dimensions(size: Size, levels: int = 1) -> dict[str, Any]:
    """Arguments of a DETR-like config."""
    shared = {"backbone_config": resnet(size, levels)}
    return shared | (SMALL if size == "tiny" else {"use_timm_backbone": False})


class Detector:
    """What the cases have in common."""

    @staticmethod
    def inputs(model: nn.Module, size: Size) -> dict[str, Any]:
        height, width = (96, 160) if size == "tiny" else (640, 832)
        return dict(padded_pictures(height, width))

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return named(result, "logits", "pred_boxes")


@architecture("detr", calls=6, packed=2, sizes=("tiny", "base"))
class Detr(Detector):
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import DetrConfig, DetrForObjectDetection

        return DetrForObjectDetection(DetrConfig(**dimensions(size)))


@architecture("detr_segmentation", calls=6, packed=2)
class DetrSegmentation(Detector):
    """Reads the encoder's output as a picture, under a mask."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import DetrConfig, DetrForSegmentation

        config = DetrConfig(**dimensions(size, levels=4) | {"encoder_attention_heads": 8})
        return DetrForSegmentation(config)

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return named(result, "logits", "pred_boxes", "pred_masks")


@architecture("conditional_detr", calls=6, packed=2)
class ConditionalDetr(Detector):
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection

        return ConditionalDetrForObjectDetection(ConditionalDetrConfig(**dimensions(size)))


@architecture("deformable_detr", calls=2, packed=2, sizes=("tiny", "base"))
class DeformableDetr(Detector):
    """In two stages, with boxes refined by every layer."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

        config = DeformableDetrConfig(
            **dimensions(size, levels=2),
            num_feature_levels=3 if size == "tiny" else 4,
            two_stage=True,
            two_stage_num_proposals=7 if size == "tiny" else 300,
            with_box_refine=True,
        )
        return DeformableDetrForObjectDetection(config)


@architecture("table_transformer", calls=6, packed=2)
class TableTransformer(Detector):
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import TableTransformerConfig, TableTransformerForObjectDetection

        return TableTransformerForObjectDetection(TableTransformerConfig(**dimensions(size)))


@architecture("dab_detr", calls=6, packed=2)
class DabDetr(Detector):
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import DabDetrConfig, DabDetrForObjectDetection

        sizes = dimensions(size)
        # With two heads the scores over the picture saturate the softmax, and its gradient is
        # rounding.
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        width = {"hidden_size": sizes.pop("d_model"), **heads} if size == "tiny" else {}
        return DabDetrForObjectDetection(DabDetrConfig(**sizes | width))


@architecture("rt_detr", calls=3)
class RTDetr(Detector):
    """Knows no padding: its pictures all have one size."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

        backbone = RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )
        config = RTDetrConfig(
            backbone_config=backbone,
            encoder_hidden_dim=32,
            encoder_in_channels=[16, 16, 16],
            encoder_layers=1,
            encoder_ffn_dim=64,
            encoder_attention_heads=2,
            d_model=32,
            num_queries=7,
            decoder_in_channels=[32, 32, 32],
            decoder_ffn_dim=64,
            decoder_layers=2,
            decoder_attention_heads=2,
            num_denoising=0,
        )
        return RTDetrForObjectDetection(config)

    @staticmethod
    def inputs(model: nn.Module, size: Size) -> dict[str, Any]:
        return {"pixel_values": pictures(3, 96, 128)}
