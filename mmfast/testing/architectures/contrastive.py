"""CLIP and its kin: two towers, or a tower of pictures that a decoder of text reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.testing.architectures._case import Size, architecture, ragged_mask

WORDS, PAD, BEGIN, END = 99, 1, 97, 98
"""The tiny vocabulary. END has the highest number, as CLIP's way of finding the end asks for."""

TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def pictures(batch: int, side: int, seed: int = 7) -> Tensor:
    """`[batch, 3, side, side]` float32, standard normal."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def sentences(
    mask: Tensor, *, words: int = WORDS - 2, begin: int = BEGIN, end: int = END, pad: int = PAD
) -> Tensor:
    """`[B, N]` int64: random words between `begin` and `end` where the mask is 1, else `pad`."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, words, mask.shape, generator=generator)
    at = torch.arange(mask.shape[1])
    last = (mask * at).amax(1, keepdim=True)
    first = (mask == 0).long().cumprod(1).sum(1, keepdim=True)
    ids = ids.masked_fill(at == first, begin).masked_fill(at == last, end)
    return ids.masked_fill(mask == 0, pad)


def text_and_pictures(model: Any, length: int, batch: int, **ids: int) -> dict[str, Any]:
    """What a model of two towers takes: padded sentences and as many pictures."""
    mask = ragged_mask(batch, length)
    side = model.config.vision_config.image_size
    return {
        "input_ids": sentences(mask, **ids),
        "attention_mask": mask,
        "pixel_values": pictures(batch, side),
    }


def valid_rows(hidden: Tensor, inputs: Mapping[str, Any], name: str = "attention_mask") -> Tensor:
    """`[T, C]`: the rows of tokens, without those of padding."""
    return hidden[inputs[name].bool()]


def two_towers(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The similarities, and what both towers say of each token."""
    return {
        "logits": result.logits_per_image,
        "text": valid_rows(result.text_model_output.last_hidden_state, inputs),
        "picture": result.vision_model_output.last_hidden_state,
    }


@architecture("clip", calls=4, packed=2, sizes=("tiny", "base"))
class Clip:
    """openai/clip-vit-base-patch32."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import CLIPConfig, CLIPModel

        if size == "base":
            return CLIPModel(CLIPConfig())
        return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24))

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        if size == "base":
            return text_and_pictures(model, 77, 8, words=49406, begin=49406, end=49407)
        return text_and_pictures(model, 20, 3)

    outputs = staticmethod(two_towers)


@architecture("clipseg", calls=6, packed=2)
class ClipSeg:
    """CIDAS/clipseg-rd64: FiLM puts the text into a decoder of the tower's layers.

    transformers runs the CLIP part without gradients, so that it is frozen here.
    """

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

        config = CLIPSegConfig(
            text_config=TEXT,
            vision_config=VISION,
            projection_dim=24,
            extract_layers=[0, 1],
            reduce_dim=16,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
            conditional_layer=1,
        )
        model = CLIPSegForImageSegmentation(config)
        model.clip.requires_grad_(False)
        return model

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return text_and_pictures(model, 20, 3)

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"logits": result.logits, "condition": result.conditional_embeddings}


def _owl_inputs(model: Any, size: Size) -> dict[str, Any]:
    """Several queries a picture."""
    queries, length = 3, 12
    mask = ragged_mask(3 * queries, length, 0.7)
    mask = mask[torch.randperm(len(mask), generator=torch.Generator().manual_seed(3))]
    ids = sentences(mask, pad=0)
    side = model.config.vision_config.image_size
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pictures(len(mask) // queries, side),
    }


def _owl_outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Logits of the queries that are there: the others are the smallest float."""
    B, _, Q = result.logits.shape
    there = (inputs["input_ids"][:, 0] > 0).reshape(B, 1, Q).expand_as(result.logits)
    outputs = {"logits": result.logits[there], "boxes": result.pred_boxes}
    objectness = getattr(result, "objectness_logits", None)
    return outputs if objectness is None else outputs | {"objectness": objectness}


_OWL_TEXT: dict[str, Any] = TEXT | {"pad_token_id": 0, "max_position_embeddings": 12}
_OWL_UNUSED = ("owlvit.logit_scale", "visual_projection.weight")


@architecture("owlvit", calls=4, packed=2, without_gradient=_OWL_UNUSED)
class OwlViT:
    """google/owlvit-base-patch32."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import OwlViTConfig, OwlViTForObjectDetection

        config = OwlViTConfig(text_config=_OWL_TEXT, vision_config=VISION, projection_dim=32)
        return OwlViTForObjectDetection(config)

    inputs = staticmethod(_owl_inputs)
    outputs = staticmethod(_owl_outputs)


@architecture("owlv2", calls=4, without_gradient=("owlv2.logit_scale", "visual_projection.weight"))
class Owlv2:
    """google/owlv2-base-patch16. The last query is empty: its mask has no token at all.

    transformers gives such rows a mean, and rows of 0 would be divided by their norm: nothing is
    left out of this batch.
    """

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import Owlv2Config, Owlv2ForObjectDetection

        config = Owlv2Config(text_config=_OWL_TEXT, vision_config=VISION, projection_dim=32)
        return Owlv2ForObjectDetection(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        inputs = _owl_inputs(model, size)
        inputs["input_ids"][-1], inputs["attention_mask"][-1] = 0, 0
        return inputs

    outputs = staticmethod(_owl_outputs)


@architecture("siglip", calls=5, packed=2)
class Siglip:
    """google/siglip-base-patch16-224. The last token is pooled, padding or not."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import SiglipConfig, SiglipModel

        text = TEXT | {"projection_size": VISION["hidden_size"]}
        return SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return text_and_pictures(model, 20, 3)

    outputs = staticmethod(two_towers)


def captions(model: Any, mask: Tensor, begin: int) -> dict[str, Any]:
    """Padded captions, and a picture each."""
    side = model.config.vision_config.image_size
    return {
        "input_ids": sentences(mask, begin=begin, end=5, pad=0, words=WORDS),
        "attention_mask": mask,
        "pixel_values": pictures(len(mask), side),
    }


@architecture("git", calls=4, packed=2, sizes=("tiny", "base"), generate={"max_new_tokens": 4})
class Git:
    """microsoft/git-base: the picture's tokens are a prefix that sees itself in both directions."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import GitConfig, GitForCausalLM

        if size == "base":
            return GitForCausalLM(GitConfig())
        text = TEXT | {"pad_token_id": 0, "eos_token_id": None}
        return GitForCausalLM(GitConfig(**text, vision_config=VISION))

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        if size == "base":
            return captions(model, ragged_mask(8, 64), 101)
        return captions(model, ragged_mask(3, 14), BEGIN)

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        return captions(model, ragged_mask(3, 6, side="left"), BEGIN)

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        length = inputs["input_ids"].shape[1]
        return {
            "picture": result.logits[:, :-length],
            "text": valid_rows(result.logits[:, -length:], inputs),
        }


def _kosmos_inputs(mask: Tensor, latents: int) -> dict[str, Any]:
    """The picture's places stand between the first token and the words."""
    at = torch.arange(mask.shape[1])
    first = (mask == 0).long().cumprod(1).sum(1, keepdim=True)
    places = ((at > first) & (at <= first + latents)).long()
    return {
        "input_ids": sentences(mask, begin=0, end=4).masked_fill(places == 1, 3),
        "attention_mask": mask,
        "image_embeds_position_mask": places,
        "pixel_values": pictures(len(mask), 16),
    }


@architecture("kosmos-2", calls=5, packed=2, generate={"max_new_tokens": 4})
class Kosmos2:
    """microsoft/kosmos-2: learned queries read the picture for a decoder of text."""

    @staticmethod
    def build(size: Size) -> nn.Module:
        from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

        text = {
            "vocab_size": WORDS,
            "embed_dim": 32,
            "layers": 2,
            "ffn_dim": 64,
            "attention_heads": 4,
            "max_position_embeddings": 48,
            "eos_token_id": None,
        }
        config = Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=5)
        # Up to transformers 5.22 sdpa takes its cross-attention, which has no mask, for causal.
        config._attn_implementation = "eager"
        return Kosmos2ForConditionalGeneration(config)

    @staticmethod
    def inputs(model: Any, size: Size) -> dict[str, Any]:
        return _kosmos_inputs(ragged_mask(3, 24), 5)

    @staticmethod
    def prompt(model: Any) -> dict[str, Any]:
        return _kosmos_inputs(ragged_mask(3, 14, 0.8, side="left"), 5)

    @staticmethod
    def outputs(result: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"logits": valid_rows(result.logits, inputs), "picture": result.image_embeds}
