"""The Qwen family: the vision-language models, qwen2_5_omni's thinker and DiT, qwen3_next."""

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
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_START, _IMAGE, _AUDIO = 92, 95, 94


def _batch(side: Any) -> dict[str, Any]:
    """Three texts of 24, 14 and 7 tokens, each with an image of 4 tokens."""
    mask = ragged_mask(3, 24, 0.65, side=side)
    ids = with_images(token_ids(mask, 88), mask, _IMAGE, 4, offset=2)
    first = mask.argmax(1)
    ids[torch.arange(3), first + 1] = _START
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(3 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 3),
    }


@architecture("qwen2_vl", calls=4, packed=2, generate=_GENERATE)
class Qwen2VL:
    """Three images in one packed vision encoder; rotary positions of three axes in the text."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 vision blocks, 2 layers of Qwen2."""
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        config = Qwen2VLConfig(
            text_config={**_TEXT, "rope_parameters": _ROPE},
            vision_config={
                "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
                "patch_size": 4,
            },
            image_token_id=_IMAGE, video_token_id=93, vision_start_token_id=_START,
            vision_end_token_id=91,
        )  # fmt: skip
        return Qwen2VLForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """The batch above."""
        batch = _batch(side)
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == _IMAGE).int()}

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        """The same with left padding."""
        return Qwen2VL.inputs(model, "tiny", "left")

    outputs = staticmethod(logits_of_tokens)


@architecture("qwen2_5_vl", calls=4, packed=2)
class Qwen25VL:
    """As qwen2_vl, with windows in the vision encoder."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 vision blocks (one of windows), 2 layers of Qwen2."""
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        config = Qwen2_5_VLConfig(
            text_config={**_TEXT, "rope_parameters": _ROPE},
            vision_config={
                "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                "patch_size": 4, "window_size": 8, "out_hidden_size": 64,
                "fullatt_block_indexes": [1],
            },
            image_token_id=_IMAGE, video_token_id=93, vision_start_token_id=_START,
            vision_end_token_id=91,
        )  # fmt: skip
        return Qwen2_5_VLForConditionalGeneration(config)

    inputs = staticmethod(Qwen2VL.inputs)
    outputs = staticmethod(logits_of_tokens)


@architecture("qwen3_vl", calls=4, packed=2)
class Qwen3VL:
    """Vision features join the text again behind its first layer."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 vision blocks, 2 layers of Qwen3."""
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        config = Qwen3VLConfig(
            text_config={
                **_TEXT, "head_dim": 16, "rope_parameters": {**_ROPE, "mrope_interleaved": True},
            },
            vision_config={
                "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                "patch_size": 4, "out_hidden_size": 64, "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            image_token_id=_IMAGE, video_token_id=93, vision_start_token_id=_START,
            vision_end_token_id=91,
        )  # fmt: skip
        return Qwen3VLForConditionalGeneration(config)

    inputs = staticmethod(Qwen2VL.inputs)
    outputs = staticmethod(logits_of_tokens)


@architecture("qwen2_5_omni", calls=6, packed=2, generate=_GENERATE)
class Qwen25Omni:
    """Its thinker: images in windows, sounds of three lengths in chunks, and text."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 vision blocks (one of windows), 2 audio layers, 2 layers of Qwen2."""
        from transformers import (
            Qwen2_5OmniThinkerConfig,
            Qwen2_5OmniThinkerForConditionalGeneration,
        )

        config = Qwen2_5OmniThinkerConfig(
            text_config={**_TEXT, "rope_parameters": _ROPE, "tie_word_embeddings": False},
            vision_config={
                "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                "patch_size": 4, "window_size": 8, "out_hidden_size": 64,
                "fullatt_block_indexes": [1],
            },
            audio_config={
                "num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 2,
                "encoder_ffn_dim": 64, "d_model": 32, "n_window": 4, "output_dim": 64,
                "max_source_positions": 32,
            },
            image_token_index=_IMAGE, audio_token_index=_AUDIO, video_token_index=93,
            vision_start_token_id=_START, vision_end_token_id=91, audio_start_token_id=90,
            audio_end_token_id=89,
        )  # fmt: skip
        return Qwen2_5OmniThinkerForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """The batch above; the first two items also hear 24 and 12 frames: 6 and 3 tokens."""
        batch = _batch(side)
        ids = batch["input_ids"]
        first = batch["attention_mask"].argmax(1)
        for item, count in ((0, 6), (1, 3)):
            at = int(first[item]) + 7
            ids[item, at] = 90
            ids[item, at + 1 : at + 1 + count] = _AUDIO
            ids[item, at + 1 + count] = 89
        heard = (torch.arange(24) < torch.tensor([[24], [12]])).long()
        return {
            **batch,
            "input_features": torch.randn(2, 8, 24),
            "feature_attention_mask": heard,
        }

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        """The same with left padding."""
        return Qwen25Omni.inputs(model, "tiny", "left")

    outputs = staticmethod(logits_of_tokens)


@architecture("qwen2_5_omni_dit", calls=2)
class Qwen25OmniDiT:
    """The diffusion transformer that makes sound: adaLN-zero, attention in blocks, no padding."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 blocks, one of which looks ahead and back."""
        from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import (
            Qwen2_5OmniDiTConfig,
        )
        from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
            Qwen2_5OmniToken2WavDiTModel,
        )

        config = Qwen2_5OmniDiTConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16, emb_dim=16,
            block_size=4, look_ahead_layers=[1], look_backward_layers=[1], num_embeds=32,
            mel_dim=8, dropout=0.0, enc_emb_dim=16, enc_dim=16, enc_channels=[16, 16, 16],
            enc_kernel_sizes=[3, 3, 1], enc_dilations=[1, 2, 1], enc_attention_channels=8,
            enc_res2net_scale=2, enc_se_channels=8,
        )  # fmt: skip
        return Qwen2_5OmniToken2WavDiTModel(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        """10 codes, two frames each, with guidance (twice the batch)."""
        return {
            "hidden_states": torch.randn(2, 20, 8),
            "condition_vector": torch.randn(2, 20, 8),
            "speaker_embedding": torch.randn(2, 20, 16),
            "quantized_code": torch.randint(0, 32, (2, 10)),
            "time_step": torch.rand(2),
        }

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The predicted spectrogram."""
        return {"spectrogram": result}


@architecture("qwen3_next", calls=1, packed=1, generate=_GENERATE)
class Qwen3Next:
    """A layer of linear attention, left as it is, and one of attention with an output gate."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        """2 layers, the second with 4 experts."""
        from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

        config = Qwen3NextConfig(
            **_TEXT, head_dim=16, layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=16, linear_value_head_dim=8, linear_num_key_heads=2,
            linear_num_value_heads=4, moe_intermediate_size=32,
            shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        )  # fmt: skip
        model = Qwen3NextForCausalLM(config)
        model.set_experts_implementation("eager")  # the default's grouped matmul has no float64
        return model

    @staticmethod
    def inputs(model: Any, size: Size, side: Any = "right") -> dict[str, Any]:
        """Three texts of 24, 16 and 7 tokens."""
        mask = ragged_mask(3, 24, 0.65, side=side)
        return {"input_ids": token_ids(mask, 96), "attention_mask": mask}

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        """The same with left padding."""
        return Qwen3Next.inputs(model, "tiny", "left")

    outputs = staticmethod(logits_of_tokens)
