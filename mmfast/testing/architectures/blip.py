"""BLIP and its successors: an image tower, a Q-Former, and text that generates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.testing.architectures._case import Size, architecture, ragged_mask
from mmfast.testing.architectures.bert_like import NARROW, TINY, VOCABULARY, rows, text

IMAGE = {**NARROW, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
QUERIES = 4
IMAGE_TOKEN = VOCABULARY - 1


def _blip_config() -> Any:
    from transformers import BlipConfig

    return BlipConfig(
        text_config={
            "vocab_size": VOCABULARY,
            **TINY,
            "encoder_hidden_size": 32,
            "projection_dim": 16,
            "max_position_embeddings": 24,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 1,
        },
        vision_config={**IMAGE, "projection_dim": 16},
        projection_dim=16,
        image_text_hidden_size=16,
    )


def _pixels(batch: int, model: Any) -> Tensor:
    side = model.config.vision_config.image_size
    return torch.randn(batch, 3, side, side)


@architecture("blip", calls=6, packed=2, generate={"max_new_tokens": 5, "do_sample": False})
class Blip:
    """Captions: a causal decoder that looks at the image."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import BlipForConditionalGeneration

        return BlipForConditionalGeneration(_blip_config())

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        tokens = text(3, 10)
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
        return {**tokens, "pixel_values": _pixels(3, model), "labels": labels}

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            "loss": result.loss,
            "logits": rows(result.logits, inputs["attention_mask"]),
            "image": result.image_embeds,
        }

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        return {
            "pixel_values": _pixels(3, model),
            "input_ids": torch.randint(5, VOCABULARY, (3, 4)),
        }


@architecture(
    "blip-retrieval",
    calls=6,
    packed=2,
    sizes=("tiny", "base"),
)
class BlipRetrieval:
    """Does the text belong to the image? A text encoder that looks at the image."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import BlipConfig, BlipForImageTextRetrieval

        return BlipForImageTextRetrieval(BlipConfig() if size == "base" else _blip_config())

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        batch, length = (4, 128) if size == "base" else (3, 10)
        return {**text(batch, length), "pixel_values": _pixels(batch, model)}

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            "score": result.itm_score,
            "image": result.last_hidden_state,
            "question": rows(result.question_embeds, inputs["attention_mask"]),
        }


@architecture("blip-vqa", calls=10, packed=2, generate={"max_new_tokens": 5, "do_sample": False})
class BlipQuestions:
    """Answers: the decoder reads the encoded question.

    It attends to the padding of the question too, whose rows therefore have to be computed.
    """

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import BlipForQuestionAnswering

        return BlipForQuestionAnswering(_blip_config())

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        answer = text(3, 6)
        return {
            **text(3, 10),
            "pixel_values": _pixels(3, model),
            "decoder_input_ids": answer["input_ids"],
            "decoder_attention_mask": answer["attention_mask"],
            "labels": answer["input_ids"].masked_fill(answer["attention_mask"] == 0, -100),
        }

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"loss": result.loss, "image": result.image_embeds}

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        return {**text(3, 10), "pixel_values": _pixels(3, model)}


def _query_config() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        **TINY,
        "encoder_hidden_size": 32,
        "max_position_embeddings": 24,
        "cross_attention_frequency": 2,
    }


def _prompt_of_images(batch: int, length: int) -> dict[str, Tensor]:
    """Places for the queries of an image before some text, padded on the left."""
    mask = ragged_mask(batch, length, side="left")
    ids = torch.randint(5, IMAGE_TOKEN, (batch, length)).masked_fill(mask == 0, 1)
    images = torch.full((batch, QUERIES), IMAGE_TOKEN)
    ids = torch.cat((ids.masked_fill(mask == 1, 1), ids), 1)  # room for the queries
    full = torch.cat((torch.zeros_like(mask), mask), 1)
    for item in range(batch):
        first = int(full[item].argmax())
        ids[item, first - QUERIES : first] = images[item]
        full[item, first - QUERIES : first] = 1
    start = length - QUERIES
    return {"input_ids": ids[:, start:], "attention_mask": full[:, start:]}


@architecture("blip-2", calls=7, packed=2, generate={"max_new_tokens": 4, "do_sample": False})
class Blip2:
    """Learned queries look at the image and are read by an OPT."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

        language = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=40,
            word_embed_proj_dim=32,
            dropout=0.0,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        )
        return Blip2ForConditionalGeneration(
            Blip2Config(
                vision_config=IMAGE,
                qformer_config=_query_config(),
                text_config=language.to_dict(),
                num_query_tokens=QUERIES,
                image_token_index=IMAGE_TOKEN,
            )
        )

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return {
            **_prompt_of_images(3, 10),
            "pixel_values": _pixels(3, model),
            "use_cache": False,
        }

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            "logits": rows(result.logits, inputs["attention_mask"]),
            "queries": result.qformer_outputs.last_hidden_state,
        }


@architecture("instructblip", calls=7, packed=4, generate={"max_new_tokens": 4, "do_sample": False})
class InstructBlip:
    """As BLIP-2 with a LLaMA, and queries that read the padded instruction as well."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import (
            InstructBlipConfig,
            InstructBlipForConditionalGeneration,
            LlamaConfig,
        )

        language = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=40,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        )
        return InstructBlipForConditionalGeneration(
            InstructBlipConfig(
                vision_config=IMAGE,
                qformer_config=_query_config(),
                text_config=language.to_dict(),
                num_query_tokens=QUERIES,
                image_token_index=IMAGE_TOKEN,
            )
        )

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        instruction = text(3, 8)
        return {
            **_prompt_of_images(3, 10),
            "pixel_values": _pixels(3, model),
            "use_cache": False,
            "qformer_input_ids": instruction["input_ids"],
            "qformer_attention_mask": instruction["attention_mask"],
        }

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            "logits": rows(result.logits, inputs["attention_mask"]),
            "queries": result.qformer_outputs.last_hidden_state[:, :QUERIES],
        }
