"""Speech and music: whisper, moonshine, musicgen, dia, speecht5, seamless_m4t, wav2vec2, hubert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.testing.architectures._case import Size, architecture, ragged_mask
from mmfast.testing.architectures.seq2seq import text, valid_rows

_BATCH = {"tiny": 3, "base": 4}
_GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def _noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _target(size: Size, vocabulary: int, length: int, pad: int = 1) -> dict[str, Any]:
    """A padded target of a decoder."""
    mask = ragged_mask(_BATCH[size], length).flip(0)
    return {
        "decoder_input_ids": text(mask, vocabulary, seed=2, pad=pad),
        "decoder_attention_mask": mask,
        "use_cache": False,
    }


def _logits(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"logits": valid_rows(result.logits, inputs["decoder_attention_mask"])}


@architecture("whisper", sizes=("tiny", "base"), calls=6, packed=2, generate=_GREEDY)
class Whisper:
    """The encoder attends to silence: only the target is padded."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        if size == "base":  # openai/whisper-base
            layers = {"encoder_layers": 6, "decoder_layers": 6, "d_model": 512}
            heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
            widths = {"encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
            config = WhisperConfig(**layers, **heads, **widths)
        else:
            config = WhisperConfig(
                vocab_size=99,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=40,
                num_mel_bins=8,
                max_source_positions=20,
                max_target_positions=24,
                decoder_start_token_id=2,
                bos_token_id=2,
                eos_token_id=3,
                pad_token_id=1,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        return WhisperForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        config = model.config
        frames = 2 * config.max_source_positions
        return {
            "input_features": _noise(_BATCH[size], config.num_mel_bins, frames),
            **_target(size, config.vocab_size, 12 if size == "tiny" else 128),
        }

    outputs = staticmethod(_logits)

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        return {"input_features": Whisper.inputs(model, "tiny")["input_features"]}


@architecture("moonshine", sizes=("tiny", "base"), calls=6, packed=4, generate=_GREEDY)
class Moonshine:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import MoonshineConfig, MoonshineForConditionalGeneration

        if size == "base":  # UsefulSensors/moonshine-base
            sizes = {"hidden_size": 416, "intermediate_size": 1664}
            layers = {"encoder_num_hidden_layers": 8, "decoder_num_hidden_layers": 8}
            config = MoonshineConfig(**sizes, **layers)
        else:
            config = MoonshineConfig(
                vocab_size=99,
                hidden_size=36,
                intermediate_size=48,
                encoder_num_hidden_layers=2,
                decoder_num_hidden_layers=2,
                encoder_num_attention_heads=2,
                decoder_num_attention_heads=2,
                pad_head_dim_to_multiple_of=8,
            )
        return MoonshineForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        frames, target = (20, 12) if size == "tiny" else (400, 96)
        mask = ragged_mask(_BATCH[size], frames).repeat_interleave(384, 1)
        return {
            "input_values": _noise(*mask.shape) * mask,
            "attention_mask": mask,
            **_target(size, model.config.vocab_size, target, pad=2),
        }

    outputs = staticmethod(_logits)

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        inputs = Moonshine.inputs(model, "tiny")
        return {name: inputs[name] for name in ("input_values", "attention_mask")}


@architecture(
    "musicgen",
    sizes=("tiny", "base"),
    calls=6,
    packed=4,
    # The unconditional half of the batch sees no text at all.
    generate=_GREEDY | {"guidance_scale": 3.0},
)
class Musicgen:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import (
            EncodecConfig,
            MusicgenConfig,
            MusicgenForConditionalGeneration,
            T5Config,
        )
        from transformers import MusicgenDecoderConfig as DecoderConfig

        if size == "base":  # facebook/musicgen-small
            encoder = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
            decoder = DecoderConfig()
            codec = EncodecConfig()
        else:
            encoder = T5Config(
                vocab_size=99, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
                relative_attention_num_buckets=8, relative_attention_max_distance=14,
            )  # fmt: skip
            decoder = DecoderConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_codebooks=2,
                num_attention_heads=4, max_position_embeddings=40, pad_token_id=60, bos_token_id=60,
            )  # fmt: skip
            codec = EncodecConfig(
                num_filters=2, hidden_size=4, codebook_size=64, codebook_dim=4,
                upsampling_ratios=[4, 2], num_residual_layers=1, num_lstm_layers=1,
                target_bandwidths=[42.0], sampling_rate=28000,
            )  # fmt: skip
        parts = {"text_encoder": encoder, "audio_encoder": codec, "decoder": decoder}
        model = MusicgenForConditionalGeneration(MusicgenConfig(**parts))
        model.audio_encoder.requires_grad_(False)  # as it is in training
        start = {"decoder_start_token_id": decoder.bos_token_id, "pad_token_id": 60}
        model.generation_config.update(**start)
        return model

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        batch, (source, target) = _BATCH[size], (20, 12) if size == "tiny" else (64, 200)
        mask, target_mask = ragged_mask(batch, source), ragged_mask(batch, target).flip(0)
        decoder = model.config.decoder
        codes = target_mask.repeat_interleave(decoder.num_codebooks, 0)
        return {
            "input_ids": text(mask, model.config.text_encoder.vocab_size, seed=1, pad=0),
            "attention_mask": mask,
            "decoder_input_ids": text(codes, decoder.vocab_size - 4, seed=2, pad=1),
            "decoder_attention_mask": target_mask,
            "use_cache": False,
        }

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        mask = inputs["decoder_attention_mask"]
        codebooks = result.logits.shape[0] // mask.shape[0]
        return {"logits": valid_rows(result.logits, mask.repeat_interleave(codebooks, 0))}

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        inputs = Musicgen.inputs(model, "tiny")
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@architecture("dia", calls=6, packed=4, generate={"max_new_tokens": 6, "do_sample": False})
class Dia:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import DiaConfig, DiaDecoderConfig, DiaEncoderConfig
        from transformers import DiaForConditionalGeneration as Model

        encoder = DiaEncoderConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
            num_key_value_heads=2, intermediate_size=40,
        )  # fmt: skip
        decoder = DiaDecoderConfig(
            vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=4,
            num_key_value_heads=2, cross_num_attention_heads=2, cross_head_dim=6,
            cross_num_key_value_heads=2, cross_hidden_size=32, intermediate_size=40,
            num_channels=3, pad_token_id=61, eos_token_id=60, bos_token_id=62,
        )  # fmt: skip
        config = DiaConfig(
            encoder_config=encoder, decoder_config=decoder, delay_pattern=[0, 1, 2], eos_token_id=60
        )
        return Model(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        mask, target = ragged_mask(3, 20), ragged_mask(3, 12).flip(0)
        codes = text(target[..., None].expand(-1, -1, 3), 60, seed=2, pad=61)
        return {
            "input_ids": text(mask, 99, seed=1, pad=0),
            "attention_mask": mask,
            "decoder_input_ids": codes,
            "decoder_attention_mask": target,
            "use_cache": False,
        }

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        mask = inputs["decoder_attention_mask"].repeat_interleave(3, 0)
        return {"logits": valid_rows(result.logits, mask)}

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        inputs = Dia.inputs(model, "tiny")
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}


# Two convolutions over the waveform: 50 samples to 23, then 11, ...
_WAVE = {"conv_dim": (16, 16), "conv_kernel": (6, 3), "conv_stride": (2, 2)}
_SPEECH = _WAVE | {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
    "mask_time_prob": 0.0,
}


def _waveform(batch: int, samples: int) -> dict[str, Tensor]:
    mask = ragged_mask(batch, samples)
    return {"input_values": _noise(batch, samples) * mask, "attention_mask": mask}


@architecture("speecht5", calls=6, packed=2, generate=_GREEDY)
class SpeechT5:
    """Speech to text."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import SpeechT5Config, SpeechT5ForSpeechToText

        config = SpeechT5Config(
            **_SPEECH,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_layers=2,
            decoder_attention_heads=2,
            decoder_ffn_dim=40,
            encoder_max_relative_position=7,
            decoder_start_token_id=2,
        )
        return SpeechT5ForSpeechToText(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return {**_waveform(3, 96), **_target(size, 40, 12)}

    outputs = staticmethod(_logits)

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        return _waveform(3, 96)


def _seamless(**more: Any) -> Any:
    from transformers import SeamlessM4TConfig

    return SeamlessM4TConfig(
        vocab_size=99,
        hidden_size=32,
        encoder_layers=2,
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_ffn_dim=40,
        decoder_attention_heads=2,
        speech_encoder_layers=2,
        speech_encoder_attention_heads=4,
        speech_encoder_intermediate_size=40,
        feature_projection_input_dim=20,
        conv_depthwise_kernel_size=5,
        adaptor_kernel_size=4,
        adaptor_stride=4,
        max_position_embeddings=40,
        **more,
    )


@architecture("seamless_m4t", calls=7, packed=4, generate=_GREEDY)
class SeamlessSpeech:
    """Speech to text: a conformer with relative positions, then a text decoder."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import SeamlessM4TForSpeechToText

        return SeamlessM4TForSpeechToText(_seamless(max_source_positions=40))

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        # Lengths that are multiples of the stride: the last pooled frame reaches into the padding.
        mask = ragged_mask(3, 40)
        features = _noise(3, 40, 20) * mask[..., None]
        return {"input_features": features, "attention_mask": mask, **_target(size, 99, 12, pad=0)}

    outputs = staticmethod(_logits)

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        inputs = SeamlessSpeech.inputs(model, "tiny")
        return {name: inputs[name] for name in ("input_features", "attention_mask")}


@architecture("seamless_m4t_text", calls=6, packed=4, generate=_GREEDY)
class SeamlessText:
    """Text to text."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import SeamlessM4TForTextToText

        return SeamlessM4TForTextToText(_seamless())

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        mask = ragged_mask(3, 20)
        ids = text(mask, 99, seed=1, pad=0)
        return {"input_ids": ids, "attention_mask": mask, **_target(size, 99, 12, pad=0)}

    outputs = staticmethod(_logits)

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        inputs = SeamlessText.inputs(model, "tiny")
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _frames(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Logits of the frames that come of samples."""
    lens = inputs["attention_mask"].sum(1)
    for kernel, stride in zip(_WAVE["conv_kernel"], _WAVE["conv_stride"], strict=True):
        lens = (lens - kernel) // stride + 1
    return {
        "logits": valid_rows(result.logits, torch.arange(result.logits.shape[1]) < lens[:, None])
    }


@architecture("wav2vec2", calls=2, packed=2)
class Wav2Vec2:
    """With its norms first (`do_stable_layer_norm`), as the large ones."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

        layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        config = Wav2Vec2Config(**_SPEECH, **layers, do_stable_layer_norm=True)
        return Wav2Vec2ForCTC(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return _waveform(3, 96)

    outputs = staticmethod(_frames)


@architecture("hubert", calls=2, packed=2)
class Hubert:
    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import HubertConfig, HubertForCTC

        layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
        return HubertForCTC(HubertConfig(**_SPEECH, **layers))

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return _waveform(3, 96)

    outputs = staticmethod(_frames)
