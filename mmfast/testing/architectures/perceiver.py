"""Perceiver: latents that attend to a padded text, and positions that attend to the latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmfast.testing.architectures._case import Size, architecture, ragged_mask
from mmfast.testing.architectures.seq2seq import text, valid_rows


@architecture("perceiver", sizes=("tiny", "base"), calls=4)
class Perceiver:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import PerceiverConfig, PerceiverForMaskedLM

        if size == "base":  # deepmind/language-perceiver
            config = PerceiverConfig(qk_channels=256, v_channels=1280)
        else:
            config = PerceiverConfig(
                num_latents=10,
                d_latents=48,
                d_model=32,
                num_self_attends_per_block=2,
                num_self_attention_heads=4,
                num_cross_attention_heads=2,
                qk_channels=16,
                v_channels=48,
                vocab_size=99,
                max_position_embeddings=24,
            )
        return PerceiverForMaskedLM(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        mask = ragged_mask(3 if size == "tiny" else 2, model.config.max_position_embeddings)
        ids = text(mask, model.config.vocab_size, pad=0)
        return {"inputs": ids, "attention_mask": mask}

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"logits": valid_rows(result.logits, inputs["attention_mask"])}
