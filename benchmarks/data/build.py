"""`python -m benchmarks.data.build CLIPS SEED FILE`: synthesise, add noise, write the features.

A process of its own, because eSpeak NG keeps state from word to word that cannot be reset (flutter,
breath): only from a fresh start does the same recipe give the same waves.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

from ..files import write_atomically
from . import MissingDataError, mnist, speech
from .features import add_noise, log_mel

TEST_FRACTION = 0.2
PIXEL_MEAN, PIXEL_STD = 0.13, 0.31
IMAGE_NOISE = 0.5  # standard deviation of the noise added to pixels, in units of theirs
SNR_DB = (-12.0, 2.0)
RATE, PITCH = (110, 230), (20, 80)
ABSENT = 0.1  # share of the training items whose image is missing; the same again without audio
MISSING_STATUS = 3

Arrays = dict[str, np.ndarray]


def main() -> int:
    """Exit status 0, or MISSING_STATUS with the reason on standard output."""
    clips, seed, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    try:
        write_atomically(path, safetensors.numpy.save(build(clips, seed)))
    except MissingDataError as error:
        print(error)
        return MISSING_STATUS
    return 0


def build(clips: int, seed: int) -> Arrays:
    """`train_*` and `test_*` arrays: the fields of `audiovisual.Part`; `speech` names eSpeak NG."""
    digits = mnist.load()
    synthesizer = speech.Synthesizer()
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(digits.labels))[:clips]
    held_out = round(clips * TEST_FRACTION)
    variants = rng.permutation(np.array(synthesizer.variants))
    cut = max(1, round(len(variants) * TEST_FRACTION))
    try:
        test = _part(digits, chosen[:held_out], synthesizer, variants[:cut], rng, 0.0)
        train = _part(digits, chosen[held_out:], synthesizer, variants[cut:], rng, ABSENT)
    finally:
        synthesizer.close()
    return {
        **{f"train_{name}": value for name, value in train.items()},
        **{f"test_{name}": value for name, value in test.items()},
        "speech": np.frombuffer(synthesizer.version.encode(), dtype=np.uint8),
        "digits": np.frombuffer(digits.sha256.encode(), dtype=np.uint8),
    }


def _part(
    digits: mnist.Digits,
    chosen: np.ndarray,
    synthesizer: speech.Synthesizer,
    variants: np.ndarray,
    rng: np.random.Generator,
    absent: float,
) -> Arrays:
    count, labels = len(chosen), digits.labels[chosen]
    clean = (digits.images[chosen].astype(np.float32) / 255.0 - PIXEL_MEAN) / PIXEL_STD
    noisy = clean + IMAGE_NOISE * rng.standard_normal(clean.shape, dtype=np.float32)
    missing = rng.random(count)
    has_image = missing >= absent
    has_audio = (missing < absent) | (missing >= 2 * absent)
    voices = rng.integers(len(speech.ACCENTS) * len(variants), size=count)
    rates, pitches = rng.integers(*RATE, size=count), rng.integers(*PITCH, size=count)
    ratios = rng.uniform(*SNR_DB, size=count)
    features: dict[int, np.ndarray] = {}
    # Loading a voice costs eSpeak NG far more than a word: say everything of one voice together.
    for item in np.argsort(voices, kind="stable"):
        if has_audio[item]:
            accent = speech.ACCENTS[voices[item] // len(variants)]
            variant = str(variants[voices[item] % len(variants)])
            word = speech.WORDS[labels[item]]
            wave = synthesizer.say(word, accent, variant, int(rates[item]), int(pitches[item]))
            noisy_wave = add_noise(wave, ratios[item], rng)
            features[int(item)] = log_mel(noisy_wave, synthesizer.sample_rate)
    lens = np.array([len(features.get(item, ())) for item in range(count)], dtype=np.int64)
    frames = np.zeros((count, int(lens.max()), next(iter(features.values())).shape[1]), np.float32)
    for item, value in features.items():
        frames[item, : len(value)] = value
    return {
        "images": np.where(has_image[:, None, None], noisy, np.float32(0)),
        "frames": frames,
        "lens": lens,
        "has_image": has_image,
        "labels": labels,
    }


if __name__ == "__main__":
    sys.exit(main())
