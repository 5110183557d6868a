"""Which regions of the picture, which words and which sounds mattered, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from encoders import REGIONS, STRIDE, words
from matplotlib.figure import Figure
from stamps import Stamps
from torch import Tensor

MODALITIES = ("image", "text", "audio")
WARM = matplotlib.colormaps["YlOrRd"]


class Explained(NamedTuple):
    """What the model says of some items, `B` of them.

    read: modality -> `[B, N]`, which share of all that the model read in this modality each token
        was: 1 a row.
    weights: `[B, 3]`, how much each modality counts in the fusion: 1 a row.
    chances: `[B, classes]`.
    """

    read: dict[str, Tensor]
    weights: Tensor
    chances: Tensor


@torch.no_grad()
def explain(model: Any, inputs: dict[str, Tensor], lens: dict[str, Tensor]) -> Explained:
    """From the attention itself (`return_importance`): a token was read by the pooling of its own
    modality, and by the other modalities in the cross-modal layers; each reader counts as much as
    the fusion lets it."""
    out = model(inputs, lens=lens, return_importance=True)
    weights = dict(zip(model.modalities, out.modality_weights.unbind(dim=1)))
    read = {}
    for name, pooled in out.pooling.items():
        share = weights[name][:, None] * pooled
        for reader, sources in out.importance.items():
            if reader != name and name in sources:
                share = share + weights[reader][:, None] * sources[name].mean(dim=(1, 2))
        read[name] = share / share.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return Explained(read, out.modality_weights, out.logits["class"].softmax(dim=1))


def draw(
    path: Path,
    part: Stamps,
    items: Sequence[int],
    explained: Explained,
    without: dict[str, Tensor],
    frames: Tensor,
    rows: Tensor,
) -> None:
    """One line for each item: its picture with the regions that mattered, its caption, its
    recording, and the chance of its class with everything and `without` a modality (`[B]`)."""
    figure = Figure(figsize=(11, 2.05 * len(items)), dpi=120)
    grid = figure.subplots(
        len(items), 4, squeeze=False, gridspec_kw={"width_ratios": (1, 1.5, 1.7, 1.5)}
    )
    for line, (panels, item) in enumerate(zip(grid, items)):
        label = int(part.labels[item])
        _regions(panels[0], part.images[item], explained.read["image"][line].numpy())
        _caption(panels[1], part.captions[item], explained.read["text"][line].numpy())
        count = int(rows[line])
        _sound(panels[2], frames[line].numpy(), explained.read["audio"][line, :count].numpy())
        bars = {"everything": float(explained.chances[line, label])}
        bars |= {f"no {name}": float(chance[line]) for name, chance in without.items()}
        _chances(panels[3], bars)
        panels[0].set_title(part.classes[label], loc="left", fontweight="bold")
        for panel, name, weight in zip(panels[:3], MODALITIES, explained.weights[line].tolist()):
            panel.set_xlabel(f"{name} counts {weight:.0%}", fontsize=8)
    grid[0][3].set_title("chance of its class", loc="left", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def _regions(panel: Any, image: np.ndarray, share: np.ndarray) -> None:
    """Grey where nobody looked."""
    side = image.shape[0]
    heat = torch.from_numpy(share).view(1, 1, REGIONS, REGIONS)
    heat = torch.nn.functional.interpolate(heat, side, mode="bicubic").clamp(min=0)[0, 0].numpy()
    heat = heat / heat.max()
    grey = image.mean(axis=2, keepdims=True) / 255 * 0.35 + 0.65
    mixed = heat[..., None] * (image / 255) + (1 - heat[..., None]) * grey
    panel.imshow(mixed.clip(0, 1))
    panel.contour(heat, levels=[0.5], colors=["#b3261e"], linewidths=0.8)
    panel.set(xticks=[], yticks=[])
    _frameless(panel)


def _caption(panel: Any, caption: str, share: np.ndarray) -> None:
    """Words on a ground as dark as they mattered, broken into lines."""
    x, y, top = 0.0, 0.9, float(share.max())
    for word, value in zip(words(caption), share):
        width = 0.029 * len(word) + 0.03
        if x > 0 and x + width > 1.0:
            x, y = 0.0, y - 0.17
        ground = {"facecolor": WARM(0.8 * float(value) / top), "edgecolor": "none", "pad": 1.6}
        panel.text(x, y, word, family="monospace", fontsize=7, va="top", bbox=ground)
        x += width
    panel.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
    _frameless(panel)


def _sound(panel: Any, frames: np.ndarray, share: np.ndarray) -> None:
    """Log-mel frames, and below them how much each stretch mattered."""
    length = len(share) * STRIDE
    panel.imshow(frames[:length].T, aspect="auto", origin="lower", cmap="Greys")
    height = frames.shape[1]
    stretch = np.repeat(share / share.max(), STRIDE)
    panel.fill_between(
        np.arange(length), -2, -2 - 12 * stretch, step="mid", color="#b3261e", linewidth=0
    )
    panel.set(xticks=[], yticks=[], ylim=(-15, height))
    _frameless(panel)


def _chances(panel: Any, bars: dict[str, float]) -> None:
    colours = ["#1b9e77", *["#8a8f98"] * (len(bars) - 1)]
    drawn = panel.barh(list(bars), list(bars.values()), color=colours)
    panel.bar_label(drawn, [f"{value:.2f}" for value in bars.values()], fontsize=7, padding=2)
    panel.invert_yaxis()
    panel.set(xlim=(0, 1.15), xticks=[])
    panel.tick_params(axis="y", labelsize=8, length=0)
    _frameless(panel)


def _frameless(panel: Any) -> None:
    for side in panel.spines.values():
        side.set_visible(False)
