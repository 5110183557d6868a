"""An image, its caption and the caption read aloud: one `MultimodalTransformer` on real data.

    python examples/image_text_audio/train.py

trains on the stamps of Tux Paint (see README.md), prints how often the class of a held-out stamp is
found with all that there is, without one modality, and with one alone, and draws which regions of
the picture, words and sounds mattered. Nothing is downloaded. Exit status 1: the data are missing.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import stamps
import torch
from encoders import (
    REGIONS,
    CaptionEncoder,
    ImageEncoder,
    SoundEncoder,
    altered,
    caption_batch,
    image_batch,
    sound_batch,
)
from picture import MODALITIES, draw, explain
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stamps import MissingDataError, Stamps
from torch import Tensor

import mmfast.nn

STEPS = 450
WIDTH, HEADS, LAYERS = 64, 4, 2
BATCH, LEARNING_RATE, WEIGHT_DECAY = 48, 2e-3, 0.1
MODALITY_DROPOUT = 0.3
"""Of each item in training, so that the model learns to do without."""
PIECE_DROPOUT = 0.3


class Batch(NamedTuple):
    """Arguments of the model."""

    inputs: dict[str, Tensor]
    lens: dict[str, Tensor]
    targets: dict[str, Tensor]


def make_model(classes: int) -> mmfast.nn.MultimodalTransformer:
    """Three encoders of this example, cross-modal layers, fusion, one head."""
    return mmfast.nn.MultimodalTransformer(
        encoders={
            "image": ImageEncoder(WIDTH),
            "text": CaptionEncoder(WIDTH),
            "audio": SoundEncoder(WIDTH),
        },
        widths=dict.fromkeys(MODALITIES, WIDTH),
        d_model=WIDTH,
        nhead=HEADS,
        num_layers=LAYERS,
        dim_feedforward=2 * WIDTH,
        dropout=0.1,
        heads={"class": classes},
        losses={"class": _loss},
        modality_dropout=MODALITY_DROPOUT,
    )


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)


def make_batch(
    part: Stamps,
    items: Sequence[int],
    rng: np.random.Generator | None = None,
    pixels: Tensor | None = None,
) -> Batch:
    """Some stamps as they are, with their first recording; or, with `rng`, as training sees them:
    pictures altered, pieces of words missing, a recording in any of the languages.

    `pixels`: `image_batch` of all of the part, where it was made before.
    """
    items = list(items)
    images = image_batch(part.images[items]) if pixels is None else pixels[items]
    words, counts = caption_batch([part.captions[i] for i in items])
    recordings = [[sound for sound in part.sounds[i] if len(sound)] for i in items]
    chosen = [int(rng.integers(len(found))) if rng else 0 for found in recordings]
    frames, rows = sound_batch([found[i] for found, i in zip(recordings, chosen)])
    if rng is not None:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        images = altered(images, generator)
        words *= torch.rand(words.shape, generator=generator) >= PIECE_DROPOUT
    return Batch(
        {"image": images, "text": words, "audio": frames},
        {"text": counts, "audio": rows},
        {"class": torch.from_numpy(part.labels[items])},
    )


def train(
    part: Stamps, steps: int, seed: int = 0, tick: Callable[[float], None] = lambda loss: None
) -> mmfast.nn.MultimodalTransformer:
    """`tick` hears the loss of every step."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = make_model(len(part.classes)).train()
    pixels = image_batch(part.images)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.permutation(len(part.labels)).tolist()
        items, order = order[:BATCH], order[BATCH:]
        batch = make_batch(part, items, rng, pixels)
        loss = model(batch.inputs, lens=batch.lens, targets=batch.targets).loss
        if not bool(loss.isfinite()):
            raise RuntimeError(f"train: the loss is {float(loss)}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tick(float(loss.detach()))
    return model.eval()


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth, then a cosine to zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def accuracy(
    model: mmfast.nn.MultimodalTransformer, part: Stamps, given: Sequence[str] = MODALITIES
) -> float:
    """Share of the stamps whose class is found with the modalities `given`."""
    right = 0
    for start in range(0, len(part.labels), BATCH):
        items = range(start, min(start + BATCH, len(part.labels)))
        batch = make_batch(part, items)
        inputs = {name: batch.inputs[name] for name in given}
        out = model(inputs, lens={name: n for name, n in batch.lens.items() if name in given})
        right += int((out.logits["class"].argmax(dim=1) == batch.targets["class"]).sum())
    return right / len(part.labels)


def erased(images: Tensor, shares: Tensor, count: int) -> Tensor:
    """White in the `count` regions with the largest shares `[B, REGIONS * REGIONS]`."""
    kept = torch.ones_like(shares).scatter(1, shares.topk(count, dim=1).indices, 0.0)
    size = images.shape[-1] // REGIONS
    kept = kept.view(-1, 1, REGIONS, REGIONS)
    kept = kept.repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
    return 1.0 - (1.0 - images) * kept


@torch.no_grad()
def erasing(model: mmfast.nn.MultimodalTransformer, part: Stamps) -> dict[str, float]:
    """Do the regions matter that are said to? The accuracy of the image alone without a quarter of
    its regions: those that mattered the most, the least, and any."""
    count = REGIONS * REGIONS // 4
    generator = torch.Generator().manual_seed(0)
    right = dict.fromkeys(("most important", "any", "least important"), 0)
    for start in range(0, len(part.labels), BATCH):
        batch = make_batch(part, range(start, min(start + BATCH, len(part.labels))))
        images = batch.inputs["image"]
        shares = explain(model, {"image": images}, {}).read["image"]
        anywhere = torch.rand(shares.shape, generator=generator)
        for name, order in zip(right, (shares, anywhere, -shares)):
            out = model({"image": erased(images, order, count)})
            found = out.logits["class"].argmax(dim=1) == batch.targets["class"]
            right[name] += int(found.sum())
    return {name: count / len(part.labels) for name, count in right.items()}


def accuracies(model: mmfast.nn.MultimodalTransformer, part: Stamps) -> dict[str, float]:
    """With everything, without each modality, with each alone, and of always the same answer."""
    most = np.bincount(part.labels).max()
    return {
        "all three": accuracy(model, part),
        **{
            f"no {name}": accuracy(model, part, [m for m in MODALITIES if m != name])
            for name in MODALITIES
        },
        **{f"{name} alone": accuracy(model, part, [name]) for name in MODALITIES},
        "the most frequent class": most / len(part.labels),
    }


def show(found: dict[str, float], without: dict[str, float], tests: int, console: Console) -> None:
    """The table of accuracies."""
    table = Table(title=f"class of {tests} held-out stamps, found with", title_justify="left")
    for name in ("", "accuracy", ""):
        table.add_column(name, justify="left" if not name else "right")
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}", "#" * round(30 * value))
        if name.startswith(("all", "no audio", "audio")):
            table.add_section()
    for name, value in without.items():
        table.add_row(f"image alone, a quarter erased: {name}", f"{value:.3f}", "")
    console.print(table)


@torch.no_grad()
def picture(model: mmfast.nn.MultimodalTransformer, part: Stamps, path: Path, lines: int) -> None:
    """One item each of as many classes: one whose class is found and whose image counts most."""
    found: list[tuple[float, int, int]] = []
    for start in range(0, len(part.labels), BATCH):
        items = range(start, min(start + BATCH, len(part.labels)))
        batch = make_batch(part, items)
        said = explain(model, batch.inputs, batch.lens)
        right = said.chances.argmax(dim=1) == batch.targets["class"]
        for b in torch.nonzero(right).flatten().tolist():
            found.append((float(said.weights[b, 0]), int(part.labels[items[b]]), items[b]))
    best = {label: item for _, label, item in sorted(found)}
    items = sorted(best.values(), key=lambda item: -max(w for w, _, i in found if i == item))
    items = items[:lines]
    if not items:
        return
    batch = make_batch(part, items)
    labels = batch.targets["class"][:, None]
    without = {}
    for name in MODALITIES:
        given = {key: value for key, value in batch.inputs.items() if key != name}
        lens = {key: value for key, value in batch.lens.items() if key != name}
        chances = model(given, lens=lens).logits["class"].softmax(dim=1)
        without[name] = chances.gather(1, labels)[:, 0]
    said = explain(model, batch.inputs, batch.lens)
    frames, rows = batch.inputs["audio"], batch.lens["audio"]
    draw(path, part, items, said, without, frames, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=stamps.FOLDER, help="where the package lies")
    parser.add_argument("--out", type=Path, default=Path("image_text_audio.png"), help="picture")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args(arguments)
    console = Console()
    start = time.perf_counter()
    try:
        with console.status("reading the stamps (half a minute the first time)"):
            everything = stamps.load(given.data)
    except MissingDataError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    run(everything, given.steps, given.out, console)
    console.print(f"{time.perf_counter() - start:.0f} s, {torch.get_num_threads()} threads")
    return 0


def run(everything: Stamps, steps: int, out: Path, console: Console) -> dict[str, float]:
    """Train, test, show, draw. Returns the accuracies."""
    part, test = stamps.split(everything)
    parameters = sum(p.numel() for p in make_model(len(part.classes)).parameters())
    console.print(
        f"{len(part.labels)} stamps to learn from, {len(test.labels)} held out, "
        f"{len(part.classes)} classes; {parameters:,} parameters"
    )
    bar = track(range(steps), "training", console=console, transient=True)
    model = train(part, steps, tick=lambda loss: next(bar, None))
    bar.close()
    found = accuracies(model, test)
    show(found, erasing(model, test), len(test.labels), console)
    picture(model, test, out, lines=5)
    console.print(f"what mattered: {out}", soft_wrap=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
