"""The multimodal transformer of the main job, and its twins.

One encoder per modality (patches of the image, frames of the sound), then audio attends to the
image and the image to the audio, then both are pooled and classified. Audio has ragged lengths and
either modality may be absent (length 0).

The network is written with `torch.nn.MultiheadAttention` and key padding masks. Its twins differ in
the attention modules alone:

- `eager`: as it stands, with the default arguments, and the usual workaround for absent modalities;
- `sdpa`: the same with `need_weights=False`, which lets torch use its fused attention;
- `mmfast`: every module replaced by `mmfast.nn.MultiheadAttention.from_torch`, no workaround.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmfast.nn

from .data.features import MELS

WINDOW, STRIDE, CLASSES = 8, 4, 10  # overlapping patches
PATCHES = (28 // STRIDE) ** 2


class Attention(nn.Module):
    """`attention(x, context, lens)`: rows of x attend to the first `lens[b]` rows of the context.

    torch.nn.MultiheadAttention with its default arguments gives NaN for an item with nothing to
    attend, and the NaN reaches the weights in the backward, whatever the loss looks at. The usual
    workaround: let such an item attend to its first (padded) row, then set its result to zero.
    mmfast needs none: nothing to attend gives exactly 0 (the modules have no output bias).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.workaround = True
        self.need_weights = True

    def forward(self, x: Tensor, context: Tensor, lens: Tensor) -> Tensor:
        """`x [B,N,C]`, `context [B,M,C]`, `lens [B]` -> `[B,N,C]`."""
        padded = torch.arange(context.shape[1], device=x.device) >= lens[:, None]
        absent = lens == 0
        if self.workaround:
            padded = padded & ~absent[:, None]
        out, _ = self.attend(
            x, context, context, key_padding_mask=padded, need_weights=self.need_weights
        )
        return out.masked_fill(absent[:, None, None], 0.0) if self.workaround else out


class Block(nn.Module):
    """Pre-norm transformer block: attention to itself or to a context, then a feed-forward."""

    def __init__(self, width: int, heads: int, *, crosses: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width) if crosses else None
        self.attention = Attention(width, heads)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, lens: Tensor, context: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if self.context_norm is not None:
            assert context is not None
            context = self.context_norm(context)
        x = x + self.attention(y, y if context is None else context, lens)
        return x + self.feed(self.feed_norm(x))


class AudioVisualTransformer(nn.Module):
    """`model(images [B,28,28], frames [B,T,MELS], image_lens [B], audio_lens [B]) -> [B,10]`.

    `image_lens` is PATCHES, or 0 where the image is absent; `audio_lens` counts frames.
    """

    def __init__(self, width: int = 64, heads: int = 4, longest: int = 256) -> None:
        super().__init__()
        self.patch = nn.Linear(WINDOW * WINDOW, width)
        self.patch_position = nn.Parameter(torch.randn(PATCHES, width) * 0.02)
        self.frame = nn.Linear(MELS, width)
        self.frame_position = nn.Parameter(torch.randn(longest, width) * 0.02)
        self.image_encoder = Block(width, heads)
        self.audio_encoder = Block(width, heads)
        self.audio_to_image = Block(width, heads, crosses=True)
        self.image_to_audio = Block(width, heads, crosses=True)
        self.head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, CLASSES))

    def forward(
        self, images: Tensor, frames: Tensor, image_lens: Tensor, audio_lens: Tensor
    ) -> Tensor:
        patches = F.unfold(images[:, None], WINDOW, padding=(WINDOW - STRIDE) // 2, stride=STRIDE)
        image = self.patch(patches.transpose(1, 2)) + self.patch_position
        audio = self.frame(frames) + self.frame_position[: frames.shape[1]]
        image = self.image_encoder(image, image_lens)
        audio = self.audio_encoder(audio, audio_lens)
        joined_audio = self.audio_to_image(audio, image_lens, image)
        joined_image = self.image_to_audio(image, audio_lens, audio)
        pooled = [pool(joined_image, image_lens), pool(joined_audio, audio_lens)]
        return self.head(torch.cat(pooled, dim=-1))


def pool(x: Tensor, lens: Tensor) -> Tensor:
    """Mean of the first `lens[b]` rows; 0 for an absent modality."""
    valid = torch.arange(x.shape[1], device=x.device) < lens[:, None]
    total = x.masked_fill(~valid[..., None], 0.0).sum(dim=1)
    return total / lens.clamp(min=1)[:, None].to(x.dtype)


def make_twins(model: nn.Module) -> dict[str, nn.Module]:
    """`eager` (the model itself), `sdpa` and `mmfast`: copies of their own, same weights."""
    return {"eager": model, "sdpa": _with_sdpa(model), "mmfast": _with_mmfast(model)}


def _with_sdpa(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in attentions(twin):
        module.need_weights = False
    return twin


def _with_mmfast(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in attentions(twin):
        module.attend = mmfast.nn.MultiheadAttention.from_torch(module.attend)
        module.need_weights = module.workaround = False
    return twin


def attentions(model: nn.Module) -> list[Attention]:
    """All attention modules of a model."""
    return [module for module in model.modules() if isinstance(module, Attention)]
