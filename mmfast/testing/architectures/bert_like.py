"""BERT-like models of two modalities: one stream or two, text that is padded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.testing.architectures._case import Size, architecture, ragged_mask

VOCABULARY = 99
NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = {
    **NARROW,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def text(
    batch: int, length: int, valid: float = 0.6, *, vocabulary: int = VOCABULARY
) -> dict[str, Tensor]:
    """Random tokens, none of them a special one, and their mask: padded on the right."""
    mask = ragged_mask(batch, length, valid)
    ids = torch.randint(5, vocabulary, (batch, length)).masked_fill(mask == 0, 1)
    return {"input_ids": ids, "attention_mask": mask}


def rows(x: Tensor, mask: Tensor) -> Tensor:
    """`[T, C]`: the rows of `[B, N, C]` that are tokens."""
    return x[mask.bool()]


@architecture("lxmert", calls=11, packed=4, sizes=("tiny", "base"))
class Lxmert:
    """Text and image regions, both padded, in two streams that attend to each other."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import LxmertConfig, LxmertModel

        if size == "base":
            return LxmertModel(LxmertConfig())
        return LxmertModel(
            LxmertConfig(
                vocab_size=VOCABULARY,
                **TINY,
                l_layers=2,
                r_layers=1,
                x_layers=2,
                visual_feat_dim=12,
                max_position_embeddings=24,
            )
        )

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        batch, length, regions = (8, 128, 36) if size == "base" else (3, 10, 6)
        return {
            **text(batch, length),
            "visual_feats": torch.randn(batch, regions, model.config.visual_feat_dim),
            "visual_pos": torch.rand(batch, regions, 4),
        }

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            "language": rows(result.language_output, inputs["attention_mask"]),
            "vision": result.vision_output,
            "pooled": result.pooled_output,
        }


@architecture("lxmert-masked-regions", calls=11, packed=7)
class LxmertMaskedRegions(Lxmert):
    """LXMERT where images have different numbers of regions."""

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        inputs = Lxmert.inputs(model, size)
        inputs["visual_attention_mask"] = ragged_mask(*inputs["visual_feats"].shape[:2]).flip(0)
        return inputs

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        outputs = Lxmert.outputs(result, inputs)
        return {**outputs, "vision": rows(outputs["vision"], inputs["visual_attention_mask"])}


@architecture("visual_bert", calls=2, packed=2, sizes=("tiny", "base"))
class VisualBert:
    """Text and image regions in one stream: the padding of the text lies in its middle."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import VisualBertConfig, VisualBertModel

        if size == "base":
            return VisualBertModel(VisualBertConfig())
        return VisualBertModel(
            VisualBertConfig(
                vocab_size=VOCABULARY, **TINY, visual_embedding_dim=12, max_position_embeddings=24
            )
        )

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        batch, length, regions = (8, 128, 36) if size == "base" else (3, 10, 6)
        features = torch.randn(batch, regions, model.config.visual_embedding_dim)
        return {
            **text(batch, length),
            "visual_embeds": features,
            "visual_attention_mask": ragged_mask(batch, regions).flip(0),
        }

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        masks = (inputs["attention_mask"], inputs["visual_attention_mask"])
        return {
            "tokens": rows(result.last_hidden_state, torch.cat(masks, 1)),
            "pooled": result.pooler_output,
        }


@architecture("vilt", calls=2, packed=2, sizes=("tiny", "base"))
class Vilt:
    """Text and image patches in one stream; images of different sizes are padded as well."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import ViltConfig, ViltModel

        if size == "base":
            return ViltModel(ViltConfig())
        return ViltModel(
            ViltConfig(
                vocab_size=VOCABULARY,
                **TINY,
                max_position_embeddings=24,
                image_size=16,
                patch_size=4,
            )
        )

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        batch, length = (8, 40) if size == "base" else (3, 10)
        side, patch = model.config.image_size, model.config.patch_size
        heights = ragged_mask(batch, side // patch, 0.7).repeat_interleave(patch, 1)
        return {
            **text(batch, length),
            "pixel_values": torch.randn(batch, 3, side, side),
            "pixel_mask": heights[:, :, None].expand(batch, side, side).contiguous(),
        }

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        # Which patches come in which order is drawn at random: [CLS] of the image is their first.
        length = inputs["input_ids"].shape[1]
        tokens = result.last_hidden_state[:, :length]
        return {
            "text": rows(tokens, inputs["attention_mask"]),
            "image": result.last_hidden_state[:, length],
            "pooled": result.pooler_output,
        }


@architecture("flava", calls=6, packed=4, sizes=("tiny", "base"))
class Flava:
    """An encoder of each modality and one of both."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import FlavaConfig, FlavaModel

        if size == "base":
            return FlavaModel(FlavaConfig())
        return FlavaModel(
            FlavaConfig(
                text_config={"vocab_size": VOCABULARY, **TINY, "max_position_embeddings": 24},
                image_config={**TINY, "image_size": 16, "patch_size": 4},
                multimodal_config=TINY,
                hidden_size=32,
                projection_dim=16,
            )
        )

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        batch, length = (8, 77) if size == "base" else (3, 10)
        side = model.config.image_config.image_size
        return {**text(batch, length), "pixel_values": torch.randn(batch, 3, side, side)}

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        mask = inputs["attention_mask"]
        images = result.multimodal_embeddings.shape[1] - mask.shape[1]
        return {
            "text": rows(result.text_embeddings, mask),
            "image": result.image_embeddings,
            "both_image": result.multimodal_embeddings[:, :images],
            "both_text": rows(result.multimodal_embeddings[:, images:], mask),
            "text_pooled": result.text_output.pooler_output,
            "image_pooled": result.image_output.pooler_output,
            "both_pooled": result.multimodal_output.pooler_output,
        }


@architecture("bridgetower", calls=12, packed=4, sizes=("tiny", "base"))
class BridgeTower:
    """Two towers whose layers feed two streams of cross-attention."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import BridgeTowerConfig, BridgeTowerModel

        if size == "base":
            return BridgeTowerModel(BridgeTowerConfig())
        wide = {**TINY, "hidden_size": 128}  # its image tower has a head every 64 channels
        return BridgeTowerModel(
            BridgeTowerConfig(
                text_config={"vocab_size": VOCABULARY, **wide, "max_position_embeddings": 24},
                vision_config={**wide, "image_size": 16, "patch_size": 4},
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        )

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        batch, length = (8, 128) if size == "base" else (3, 10)
        side = model.config.vision_config.image_size
        return {**text(batch, length), "pixel_values": torch.randn(batch, 3, side, side)}

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            "text": rows(result.text_features, inputs["attention_mask"]),
            "image": result.image_features,
            "pooled": result.pooler_output,
        }
