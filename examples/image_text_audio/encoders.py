"""Small encoders, one a modality, and the tensors that they take. Each gives `[B, N, width]`: a row
for a region of the picture, a word of the caption, 80 ms of the recording."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from stamps import LONGEST, MELS
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS, REGIONS = 64, 8  # a picture is PIXELS x PIXELS for its encoder, REGIONS x REGIONS after it
BUCKETS, PIECES, WORDS = 4096, 24, 24  # hashed pieces of words; most pieces a word, words a caption
STRIDE = 8  # frames of a row


class ImageEncoder(nn.Module):
    """`[B, 3, PIXELS, PIXELS]` in 0..1 -> `[B, REGIONS * REGIONS, width]`: three convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(3, 32), *_convolution(32, 64), *_convolution(64, width)
        )
        self.position = nn.Parameter(torch.randn(REGIONS * REGIONS, width) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """The regions, row by row."""
        return self.layers(images * 2 - 1).flatten(2).transpose(1, 2) + self.position


class CaptionEncoder(nn.Module):
    """`[B, W, PIECES]` ids, 0 = no piece -> `[B, W, width]`: a word is the mean of its pieces."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pieces = nn.Embedding(BUCKETS, width, padding_idx=0)
        nn.init.normal_(self.pieces.weight, std=0.5)
        with torch.no_grad():
            self.pieces.weight[0] = 0.0
        self.position = nn.Parameter(torch.randn(WORDS, width) * 0.02)

    def forward(self, pieces: Tensor) -> Tensor:
        """The words in their order."""
        count = (pieces != 0).sum(dim=-1, keepdim=True).clamp(min=1)
        return self.pieces(pieces).sum(dim=-2) / count + self.position[: pieces.shape[1]]


class SoundEncoder(nn.Module):
    """`[B, T, MELS]`, T a multiple of STRIDE -> `[B, T / STRIDE, width]`.

    One convolution over windows of two rows, then each row for itself: another one would carry what
    lies in the padding, biases, into the last valid row.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.window = nn.Conv1d(MELS, 2 * width, 2 * STRIDE, stride=STRIDE, padding=STRIDE // 2)
        self.row = nn.Linear(2 * width, width)
        self.position = nn.Parameter(torch.randn(-(-LONGEST // STRIDE), width) * 0.02)

    def forward(self, frames: Tensor) -> Tensor:
        """One row for STRIDE frames."""
        rows = self.row(F.gelu(self.window(frames.transpose(1, 2)).transpose(1, 2)))
        return rows + self.position[: rows.shape[1]]


def _convolution(channels: int, width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.GELU()


# --- from stamps to tensors ------------------------------------------------------------------


def words(caption: str) -> list[str]:
    """What the caption is cut into, at most WORDS."""
    return caption.split()[:WORDS]


def pieces(word: str) -> list[int]:
    """Hashed ids of a word's pieces: the word and its runs of 3 to 5 letters, "<" and ">" its ends
    (fastText, Bojanowski et al. 2017), so that an unknown word has known pieces."""
    marked = f"<{''.join(c for c in word.casefold() if c.isalnum()) or word}>"
    runs = [marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)]
    different = list(dict.fromkeys([marked, *runs]))[:PIECES]
    return [1 + zlib.crc32(run.encode()) % (BUCKETS - 1) for run in different]


def caption_batch(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """`[B, W, PIECES]` ids and `[B]` numbers of words."""
    cut = [words(caption) for caption in captions]
    ids = torch.zeros(len(cut), max(1, *map(len, cut)), PIECES, dtype=torch.long)
    for b, sentence in enumerate(cut):
        for w, word in enumerate(sentence):
            found = pieces(word)
            ids[b, w, : len(found)] = torch.tensor(found)
    return ids, torch.tensor([len(sentence) for sentence in cut])


def sound_batch(sounds: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """`[B, T, MELS]` frames, T a multiple of STRIDE, and `[B]` numbers of rows they will be."""
    rows = [-(-len(sound) // STRIDE) for sound in sounds]
    frames = torch.zeros(len(sounds), STRIDE * max(1, *rows), MELS)
    for b, sound in enumerate(sounds):
        frames[b, : len(sound)] = torch.from_numpy(sound.astype(np.float32))
    return frames, torch.tensor(rows)


def image_batch(images: np.ndarray) -> Tensor:
    """`[B, S, S, 3]` uint8 -> `[B, 3, PIXELS, PIXELS]` in 0..1."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return F.adaptive_avg_pool2d(pixels, PIXELS)


def altered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored, turned, moved, made larger or smaller, in other colours: pictures to learn from."""
    B = images.shape[0]

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(B, *shape, generator=generator)

    angle, scale = between(-0.25, 0.25), between(0.8, 1.25)
    mirror = torch.where(between(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    move = between(-0.15, 0.15, 2)
    matrix = torch.stack(
        [torch.stack([mirror * cos, -sin, move[:, 0]], 1),
         torch.stack([mirror * sin, cos, move[:, 1]], 1)], 1,
    )  # fmt: skip
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    white = 1.0 - F.grid_sample(1.0 - images, grid, align_corners=False)
    return (white * between(0.8, 1.2, 3, 1, 1) + between(-0.1, 0.1, 1, 1, 1)).clamp(0, 1)
