"""Text encoders: BERT and RoBERTa, alone, beside another tower, or reading pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.testing.architectures._case import Size, architecture, ragged_mask
from mmfast.testing.architectures.bert_like import TINY, VOCABULARY, rows, text


@architecture("align", calls=2, packed=2)
class Align:
    """BERT for the text beside an EfficientNet for the image."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import AlignConfig, AlignModel

        return AlignModel(
            AlignConfig(
                text_config={"vocab_size": VOCABULARY, **TINY, "max_position_embeddings": 24},
                vision_config={
                    "image_size": 16,
                    "hidden_dim": 32,
                    "width_coefficient": 0.25,
                    "depth_coefficient": 0.5,
                    "kernel_sizes": [3],
                    "in_channels": [16],
                    "out_channels": [16],
                    "strides": [1],
                    "num_block_repeats": [1],
                    "expand_ratios": [1],
                    "drop_connect_rate": 0.0,
                },
                projection_dim=8,  # the width of its image features
            )
        )

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return {**text(3, 10), "pixel_values": torch.randn(3, 3, 16, 16)}

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        tokens = result.text_model_output.last_hidden_state
        return {
            "tokens": rows(tokens, inputs["attention_mask"]),
            "logits_per_text": result.logits_per_text,
            "pooled": result.text_model_output.pooler_output,
        }


@architecture("clap", calls=2, packed=2)
class Clap:
    """RoBERTa for the text beside a Swin transformer for the sound."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import ClapConfig, ClapModel

        return ClapModel(
            ClapConfig(
                text_config={"vocab_size": VOCABULARY, **TINY, "max_position_embeddings": 24},
                audio_config={
                    "spec_size": 32,
                    "num_mel_bins": 8,
                    "window_size": 2,
                    "hidden_size": 32,
                    "patch_embeds_hidden_size": 16,
                    "depths": [1, 1],
                    "num_hidden_layers": 2,
                    "num_attention_heads": [2, 2],
                    "patch_size": 4,
                    "patch_stride": 4,
                    "hidden_dropout_prob": 0.0,
                    "attention_probs_dropout_prob": 0.0,
                },
                projection_dim=16,
            )
        )

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return {**text(3, 10), "input_features": torch.randn(3, 1, 20, 8)}

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        tokens = result.text_model_output.last_hidden_state
        return {
            "tokens": rows(tokens, inputs["attention_mask"]),
            "logits_per_text": result.logits_per_text,
        }


class _Text:
    """Text in, tokens and their pooled first one out."""

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        batch, length = (8, 256) if size == "base" else (3, 10)
        return text(batch, length)

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            "tokens": rows(result.last_hidden_state, inputs["attention_mask"]),
            "pooled": result.pooler_output,
        }


@architecture("bert", calls=2, packed=2, sizes=("tiny", "base"))
class Bert(_Text):
    """The text encoder that most of these models took."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import BertConfig, BertModel

        if size == "base":
            return BertModel(BertConfig())
        return BertModel(BertConfig(vocab_size=VOCABULARY, **TINY, max_position_embeddings=24))


@architecture("bert-decoder", calls=4, packed=2)
class BertDecoder(_Text):
    """BERT as the decoder of another encoder: causal, with cross-attention, both padded."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import BertConfig, BertModel

        return BertModel(
            BertConfig(
                vocab_size=VOCABULARY,
                **TINY,
                max_position_embeddings=24,
                is_decoder=True,
                add_cross_attention=True,
                use_cache=False,
            )
        )

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return {
            **text(3, 10),
            "encoder_hidden_states": torch.randn(3, 7, 32),
            "encoder_attention_mask": ragged_mask(3, 7).flip(0),
        }


@architecture("roberta", calls=2, packed=2)
class Roberta(_Text):
    """As BERT, with positions that begin behind the padding token."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import RobertaConfig, RobertaModel

        return RobertaModel(
            RobertaConfig(vocab_size=VOCABULARY, **TINY, max_position_embeddings=24)
        )


def _boxes(batch: int, length: int) -> Tensor:
    corners = torch.randint(0, 40, (batch, length, 2))
    return torch.cat((corners, corners + torch.randint(0, 20, (batch, length, 2))), -1)


@architecture("layoutlm", calls=2, packed=2)
class LayoutLM(_Text):
    """Words and where they stand on the page."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import LayoutLMConfig, LayoutLMModel

        return LayoutLMModel(
            LayoutLMConfig(
                vocab_size=VOCABULARY,
                **TINY,
                max_position_embeddings=24,
                max_2d_position_embeddings=64,
            )
        )

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return {**text(3, 10), "bbox": _boxes(3, 10)}


@architecture(
    "layoutlmv3",
    calls=2,
    packed=0,
)
class LayoutLMv3:
    """Words, boxes and patches in one stream, with biases of the relative positions."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import LayoutLMv3Config, LayoutLMv3Model

        return LayoutLMv3Model(
            LayoutLMv3Config(
                vocab_size=VOCABULARY,
                **TINY,
                max_position_embeddings=24,
                max_2d_position_embeddings=64,
                coordinate_size=5,
                shape_size=6,
                input_size=16,
                patch_size=4,
                rel_pos_bins=8,
                max_rel_pos=16,
                rel_2d_pos_bins=8,
                max_rel_2d_pos=32,
            )
        )

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return {**text(3, 10), "bbox": _boxes(3, 10), "pixel_values": torch.randn(3, 3, 16, 16)}

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        length = inputs["input_ids"].shape[1]
        tokens = result.last_hidden_state
        return {
            "text": rows(tokens[:, :length], inputs["attention_mask"]),
            "image": tokens[:, length:],
        }
