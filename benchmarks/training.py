"""The main job: train the audio-visual network and its twins (model.py) side by side.

Same weights, same batches, same missing modalities. First one batch is compared (outputs, loss,
gradients), then all are trained step by step in turns, so that the step times can be compared; then
held-out accuracy with both modalities, without the image, and without the audio.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data.audiovisual import AudioVisual, Part
from .memory import step_peak
from .model import PATCHES, AudioVisualTransformer, attentions, make_twins
from .stats import quantiles, repeats
from .timing import quiet, timed

MODALITY_DROPOUT = 0.3
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 3e-3, 0.05, 0.1


class Batch(NamedTuple):
    """Arguments of the model, then the labels."""

    images: Tensor
    frames: Tensor
    image_lens: Tensor
    audio_lens: Tensor
    labels: Tensor


def run(
    data: AudioVisual,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    budget_s: float = math.inf,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The whole comparison as a JSON-ready dict; `tick()` is called after every round of steps.

    On a machine so slow that `steps` of all twins would take longer than `budget_s`, as many as do
    not, but a fifth at least: `steps` and `steps_wanted` of the result differ.
    """
    torch.manual_seed(seed)
    longest = max(part.frames.shape[1] for part in (data.train, data.test))
    first = AudioVisualTransformer(longest=longest).to(device)
    models = make_twins(first)
    probe = _with_absent(next(make_batches(data.train, 1, batch_size, seed, device)))
    wanted = steps
    steps = repeats(_round_s(models, probe, device), budget_s, max(1, wanted // 5), wanted)
    result: dict[str, Any] = {
        "data": data.about,
        "parameters": sum(p.numel() for p in first.parameters()),
        "steps": steps,
        "steps_wanted": wanted,
        "batch_size": batch_size,
        "seed": seed,
        "agreement": compare(models["eager"], models["mmfast"], probe),
        "without_workaround": show_nan(models["eager"], models["mmfast"], probe),
        "step_peak_bytes": {
            name: step_peak(lambda model=model: loss_of(model, probe).backward(), device)
            for name, model in models.items()
        },
    }
    for model in models.values():
        model.zero_grad(set_to_none=True)
    batches = list(make_batches(data.train, steps, batch_size, seed, device))
    result |= _train(models, batches, device, tick)
    result["accuracy"] = {
        name: {
            "both": accuracy(model, data.test, device),
            "image_missing": accuracy(model, data.test, device, image=False),
            "audio_missing": accuracy(model, data.test, device, audio=False),
        }
        for name, model in models.items()
    }
    return result


def _round_s(models: dict[str, nn.Module], batch: Batch, device: torch.device) -> float:
    """Seconds of one step of every model, roughly: the second of two."""
    for _ in range(2):
        total = 0.0
        for model in models.values():
            total += timed(lambda model=model: loss_of(model, batch).backward(), device)[1]
            model.zero_grad(set_to_none=True)
    return total


def make_batches(
    part: Part, steps: int, batch_size: int, seed: int, device: torch.device
) -> Iterator[Batch]:
    """Shuffled batches for `steps` steps, cut to their longest clip, with modality dropout: an item
    loses one of its modalities with probability MODALITY_DROPOUT, never both."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(len(part.labels))])
        items, order = order[:batch_size], order[batch_size:]
        has_image, audio_lens = part.has_image[items], part.lens[items]
        lose = (rng.random(batch_size) < MODALITY_DROPOUT) & has_image & (audio_lens > 0)
        lose_image = rng.random(batch_size) < 0.5
        has_image = has_image & ~(lose & lose_image)
        audio_lens = np.where(lose & ~lose_image, 0, audio_lens)
        yield _to_batch(part, items, has_image, audio_lens, device)


def _to_batch(
    part: Part,
    items: np.ndarray,
    has_image: np.ndarray,
    audio_lens: np.ndarray,
    device: torch.device,
) -> Batch:
    longest = max(1, int(audio_lens.max()))
    return Batch(
        torch.from_numpy(part.images[items]).to(device),
        torch.from_numpy(np.ascontiguousarray(part.frames[items, :longest])).to(device),
        torch.from_numpy(np.where(has_image, PATCHES, 0)).to(device),
        torch.from_numpy(audio_lens).to(device),
        torch.from_numpy(part.labels[items]).to(device),
    )


def _with_absent(batch: Batch) -> Batch:
    """The batch with the first item's audio and the second item's image taken away."""
    image_lens, audio_lens = batch.image_lens.clone(), batch.audio_lens.clone()
    image_lens[0], audio_lens[0] = PATCHES, 0
    image_lens[1] = 0
    return batch._replace(image_lens=image_lens, audio_lens=audio_lens)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of one batch."""
    return F.cross_entropy(model(*batch[:4]), batch.labels)


def compare(eager_twin: nn.Module, mmfast_twin: nn.Module, batch: Batch) -> dict[str, Any]:
    """Largest differences of outputs, loss and gradients on one batch with absent modalities.

    `eager_error` and `mmfast_error` are the errors of the two float32 logits against the same
    network in float64: mmfast should be no further from the truth than torch.
    """
    grads, logits, losses = {}, {}, {}
    twins = {"eager": eager_twin, "mmfast": mmfast_twin}
    for name, model in twins.items():
        model.zero_grad(set_to_none=True)
        logits[name] = model(*batch[:4])
        loss = F.cross_entropy(logits[name], batch.labels)
        loss.backward()
        losses[name] = loss.item()
        grads[name] = [p.grad for p in model.parameters()]
    largest = max(g.abs().max().item() for g in grads["eager"])
    differences = [
        (a - b).abs().max().item() for a, b in zip(grads["eager"], grads["mmfast"], strict=True)
    ]
    return {
        "logits_max_difference": (logits["eager"] - logits["mmfast"]).abs().max().item(),
        "loss": losses,
        "loss_difference": abs(losses["eager"] - losses["mmfast"]),
        "gradient_max_difference": max(differences),
        "gradient_largest": largest,
        **_errors(eager_twin, logits, batch),
    }


def _errors(model: nn.Module, logits: dict[str, Tensor], batch: Batch) -> dict[str, float]:
    exact_model = copy.deepcopy(model).double()
    images, frames, *lens = batch[:4]
    with torch.no_grad():
        exact = exact_model(images.double(), frames.double(), *lens)
    return {
        "eager_error": (logits["eager"] - exact).abs().max().item(),
        "mmfast_error": (logits["mmfast"] - exact).abs().max().item(),
    }


def show_nan(eager_twin: nn.Module, mmfast_twin: nn.Module, batch: Batch) -> dict[str, Any]:
    """What an absent modality does to torch.nn.MultiheadAttention without its workaround.

    The loss is taken over the items that have both modalities: the absent ones play no part in it.
    """
    complete = (batch.image_lens > 0) & (batch.audio_lens > 0)
    found = {}
    for module in attentions(eager_twin):
        module.workaround = False
    for name, model in (("eager", eager_twin), ("mmfast", mmfast_twin)):
        model.zero_grad(set_to_none=True)
        logits = model(*batch[:4])
        F.cross_entropy(logits[complete], batch.labels[complete]).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found[name] = {
            "items": len(logits),
            "items_absent": int((~complete).sum()),
            "items_nan": int(logits.isnan().any(dim=1).sum()),
            "parameters": len(grads),
            "parameters_nan": sum(bool(g.isnan().any()) for g in grads),
        }
        model.zero_grad(set_to_none=True)
    for module in attentions(eager_twin):
        module.workaround = True
    return found


def _train(
    models: dict[str, nn.Module],
    batches: list[Batch],
    device: torch.device,
    tick: Callable[[], None],
) -> dict[str, Any]:
    steps, names = len(batches), list(models)
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for name, model in models.items()
    }
    schedules = {
        name: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        for name, optimizer in optimizers.items()
    }
    losses: dict[str, list[float]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}

    def step(name: str, batch: Batch) -> Tensor:
        optimizers[name].zero_grad(set_to_none=True)
        loss = loss_of(models[name], batch)
        loss.backward()
        optimizers[name].step()
        return loss.detach()

    with quiet():
        for index, batch in enumerate(batches):
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                loss, taken = timed(lambda name=name, batch=batch: step(name, batch), device)
                schedules[name].step()
                losses[name].append(loss.item())
                seconds[name].append(taken)
            tick()
    warm = min(10, steps // 4)
    times = {name: quantiles([1e3 * s for s in values[warm:]]) for name, values in seconds.items()}
    return {
        "step_ms": {name: value._asdict() for name, value in times.items()},
        "step_ratio": {
            name: times[name].p50 / times["mmfast"].p50 for name in names if name != "mmfast"
        },
        "losses": losses,
    }


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def accuracy(
    model: nn.Module, part: Part, device: torch.device, *, image: bool = True, audio: bool = True
) -> float:
    """Share of the held-out items classified rightly, with or without a modality."""
    model.eval()
    right, size = 0, 200
    for start in range(0, len(part.labels), size):
        items = np.arange(start, min(start + size, len(part.labels)))
        has_image = part.has_image[items] & image
        lens = part.lens[items] if audio else np.zeros(len(items), dtype=np.int64)
        batch = _to_batch(part, items, has_image, lens, device)
        right += int((model(*batch[:4]).argmax(dim=1) == batch.labels).sum())
    model.train()
    return right / len(part.labels)
