"""The stamps of Tux Paint: pictures, their captions, and the captions read aloud by people.

Read straight from Debian's package `tuxpaint-stamps-default` (GPL-2, Bill Kendrick and
contributors), which the user downloads with apt-get; it is neither unpacked nor redistributed here.
Its SHA-256 is checked first, and with it every file inside.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import itertools
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

PACKAGE = "tuxpaint-stamps-default"
FILE = f"{PACKAGE}_2022.06.04-1_all.deb"
SHA256 = "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"
FOLDER = Path(__file__).resolve().parent / "data"
LANGUAGES = ("es", "ca", "fr", "ro")
"""Of the speech: people recorded nearly every stamp in these. The captions are English."""
SIDE = 128  # pixels of a picture
MELS, RATE, WINDOW, HOP = 40, 16000, 400, 160
LONGEST = 300  # frames of 10 ms
FEWEST = 20  # stamps of a class
TEST_SHARE = 0.25
_FORMAT = 1  # raise it when features are computed in another way: old caches are then not read
_FILES = re.compile(
    rf"\./usr/share/tuxpaint/stamps/(.+?)(\.png|\.svg|\.txt|_desc_(?:{'|'.join(LANGUAGES)})\.ogg)"
)


class MissingDataError(RuntimeError):
    """The package, or what it takes to read it, is not here; the message says how to get it."""


class Stamps(NamedTuple):
    """`n` stamps.

    images: `[n, SIDE, SIDE, 3]` uint8, on white.
    captions: `n` English sentences.
    sounds: for each stamp its recordings, log-mel frames `[T, MELS]` in the order of LANGUAGES;
        T = 0 where there is none.
    labels: `[n]` int64, into `classes`: the folder that the stamp lies in.
    names: `n` paths in the package.
    """

    images: np.ndarray
    captions: list[str]
    sounds: list[list[np.ndarray]]
    labels: np.ndarray
    names: list[str]
    classes: list[str]

    def take(self, chosen: Sequence[int]) -> Stamps:
        """Some of them."""
        return Stamps(
            self.images[list(chosen)],
            [self.captions[i] for i in chosen],
            [self.sounds[i] for i in chosen],
            self.labels[list(chosen)],
            [self.names[i] for i in chosen],
            self.classes,
        )


def load(folder: Path = FOLDER) -> Stamps:
    """All stamps that have a picture, a caption and a recording, of classes with FEWEST or more.

    The first call takes about half a minute and leaves a safetensors file beside the package, which
    later calls read. Raises MissingDataError when the package is not in `folder`, is not the one
    that is known here, or something to read it with is not installed.
    """
    package = folder / FILE
    if not package.is_file():
        raise MissingDataError(
            f"stamps: {package} is not there. Debian 12 has it (161 MB, GPL-2); this fetches it "
            f"and installs nothing:\n  mkdir -p {folder} && cd {folder} && "
            f"apt-get download {PACKAGE}"
        )
    cache = folder / f"stamps-{_recipe()}.safetensors"
    if (found := _read(cache)) is None:
        found = _features(package)
        _write(cache, found)
    return _chosen(found)


def split(stamps: Stamps, seed: int = 0) -> tuple[Stamps, Stamps]:
    """A training and a test part (TEST_SHARE of each class, nearly). Stamps with the same caption
    stay together: no caption of the test part was seen in training."""
    rng = np.random.default_rng(seed)
    same: dict[str, list[int]] = {}
    for item, caption in enumerate(stamps.captions):
        same.setdefault(caption.casefold(), []).append(item)
    groups = list(same.values())
    wanted = TEST_SHARE * np.bincount(stamps.labels)
    test: list[int] = []
    for index in rng.permutation(len(groups)):
        label = stamps.labels[groups[index][0]]
        if wanted[label] > 0:
            test.extend(groups[index])
            wanted[label] -= len(groups[index])
    train = np.setdiff1d(np.arange(len(stamps.labels)), test)
    return stamps.take(train.tolist()), stamps.take(sorted(test))


def _recipe() -> str:
    """Names the cache: another package or other settings are another file."""
    settings = (SHA256, LANGUAGES, SIDE, MELS, RATE, WINDOW, HOP, LONGEST, _FORMAT)
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def _chosen(found: dict[str, np.ndarray]) -> Stamps:
    names = found["names"].tobytes().decode().split("\n")
    captions = found["captions"].tobytes().decode().split("\n")
    folders = [name.partition("/")[0] for name in names]
    counts = Counter(folders)
    classes = sorted(name for name, count in counts.items() if count >= FEWEST)
    wanted = [i for i, name in enumerate(folders) if name in classes]
    starts, values = found["starts"], found["frames"]
    sounds = [[values[a:b] for a, b in itertools.pairwise(row)] for row in starts]
    labels = np.asarray(
        [classes.index(folders[i]) if i in wanted else -1 for i in range(len(names))]
    )
    return Stamps(found["images"], captions, sounds, labels, names, classes).take(wanted)


# --- reading the package ---------------------------------------------------------------------


def _features(package: Path) -> dict[str, np.ndarray]:
    pictures, vectors, audio = _import("PIL.Image"), _import("resvg_py"), _import("soundfile")
    with package.open("rb") as file:
        _verify(file, package)
        files = _members(file)
    names = sorted(
        name
        for name, parts in files.items()
        if ".txt" in parts and parts.keys() & {".png", ".svg"} and any("_desc" in p for p in parts)
    )

    def features(name: str) -> tuple[np.ndarray, str, list[np.ndarray]]:
        parts = files[name]
        png = parts.get(".png") or vectors.svg_to_bytes(
            svg_string=parts[".svg"].decode(errors="replace"),
            width=SIDE,
            dpi=96,
            skip_system_fonts=True,
        )
        recordings = [parts.get(f"_desc_{language}.ogg") for language in LANGUAGES]
        sounds = [_sound(audio, ogg) for ogg in recordings]
        caption = parts[".txt"].decode(errors="replace").split("\n")[0].strip()
        return _picture(pictures, png), caption, sounds

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(features, names))
    lengths = [[len(sound) for sound in sounds] for _, _, sounds in made]
    ends = np.cumsum(lengths).reshape(len(names), len(LANGUAGES))
    return {
        "names": np.frombuffer("\n".join(names).encode(), dtype=np.uint8),
        "captions": np.frombuffer("\n".join(c for _, c, _ in made).encode(), dtype=np.uint8),
        "images": np.stack([image for image, _, _ in made]),
        "frames": np.concatenate([sound for _, _, sounds in made for sound in sounds]),
        "starts": np.concatenate([np.append(0, ends[:-1, -1])[:, None], ends], axis=1),
    }


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # soundfile without its C library: OSError
        raise MissingDataError(
            f"stamps: {error}; pip install -r {Path(__file__).parent / 'requirements.txt'}"
        ) from None


def _verify(file: BinaryIO, package: Path) -> None:
    """Leaves the file at its start."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    if digest.hexdigest() != SHA256:
        raise MissingDataError(
            f"stamps: {package} has SHA-256 {digest.hexdigest()}, not {SHA256}: it is damaged, or "
            f"not the one of Debian 12. Delete it and run apt-get download {PACKAGE} again"
        )
    file.seek(0)


def _members(file: BinaryIO) -> dict[str, dict[str, bytes]]:
    """What is wanted of the package, by stamp ("animals/birds/owl") and ending ("_desc_fr.ogg").

    A .deb is an `ar` archive (ar(5): a header of 60 bytes before each member, even offsets) whose
    member data.tar.xz has the files.
    """
    file.seek(8)
    while (header := file.read(60)) and not header.startswith(b"data.tar"):
        size = int(header[48:58])
        file.seek(size + size % 2, os.SEEK_CUR)
    files: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=file, mode="r|xz") as archive:
        for member in archive:
            wanted = _FILES.fullmatch(member.name)
            if wanted and member.isfile() and (content := archive.extractfile(member)):
                files.setdefault(wanted[1], {})[wanted[2]] = content.read()
    return files


def _picture(pictures: Any, png: bytes) -> np.ndarray:
    """Fitted into a square and laid on white."""
    image = pictures.open(io.BytesIO(png)).convert("RGBA")
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(edge * scale)) for edge in image.size)
    image = image.resize(size, pictures.Resampling.LANCZOS)
    square = pictures.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(image, tuple((SIDE - edge) // 2 for edge in size))
    return np.asarray(square.convert("RGB"))


def _sound(audio: Any, ogg: bytes | None) -> np.ndarray:
    """Log-mel frames, normalised over the clip, without the silence before and after."""
    if ogg is None:
        return np.zeros((0, MELS), dtype=np.float16)
    wave, rate = audio.read(io.BytesIO(ogg), dtype="float32", always_2d=True)
    level = _log_mel(wave.mean(axis=1), rate)
    loud = np.flatnonzero(level.max(axis=1) > level.max() - 2.5)  # 50 dB below the loudest
    level = level[loud[0] : loud[-1] + 1][:LONGEST]
    return ((level - level.mean()) / (level.std() + 1e-5)).astype(np.float16)


def _log_mel(wave: np.ndarray, rate: int) -> np.ndarray:
    """`log10` of mel-filtered power spectra `[T, MELS]`, windows of 25 ms every 10 ms."""
    window, hop = WINDOW * rate // RATE, HOP * rate // RATE
    wave = np.pad(wave, (0, max(0, window - wave.size)))
    frames = np.lib.stride_tricks.sliding_window_view(wave, window)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window).astype(np.float32), 2048)) ** 2
    return np.log10(power.astype(np.float32) @ _mel_filters(rate) + 1e-6)


@lru_cache(maxsize=8)
def _mel_filters(rate: int) -> np.ndarray:
    """Triangles `[1025, MELS]` evenly spaced in mel = 2595 log10(1 + f/700), up to 8 kHz."""
    top = 2595.0 * np.log10(1.0 + RATE / 2 / 700.0)
    corners = 700.0 * (10.0 ** (np.linspace(0.0, top, MELS + 2) / 2595.0) - 1.0)
    frequency = np.fft.rfftfreq(2048, 1.0 / rate)[:, None]
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    rise, fall = (frequency - low) / (centre - low), (high - frequency) / (high - centre)
    return np.maximum(0.0, np.minimum(rise, fall)).astype(np.float32)


# --- the cache -------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """None when it is not there or not what `_write` wrote."""
    try:
        found = safetensors.numpy.load_file(path)
        names, captions = (found[key].tobytes().decode() for key in ("names", "captions"))
        count, lengths = len(found["images"]), np.diff(found["starts"])
        fits = (
            names.count("\n") == captions.count("\n") == count - 1
            and found["images"].shape == (count, SIDE, SIDE, 3)
            and lengths.shape == (count, len(LANGUAGES))
            and lengths.min() >= 0
            and found["frames"].shape == (lengths.sum(), MELS)
        )
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        return None
    return found if fits else None


def _write(path: Path, features: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".stamps-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(safetensors.numpy.save(features))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink()
        raise
