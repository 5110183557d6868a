"""Spoken words from eSpeak NG through ctypes (the library inside `espeakng-loader`).

The synthesiser is one global state per process and is not thread-safe: one `Synthesizer` at a time.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import tempfile
from pathlib import Path

import numpy as np

from . import MissingDataError

PACKAGE = "espeakng_loader"
REMEDY = "install it with: pip install espeakng-loader"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = (
    "en",
    "en-us",
    "en-us-nyc",
    "en-029",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-gb-x-rp",
)
# speak_lib.h
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_POS_CHARACTER = 1
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_LONGEST_PATH = 140  # eSpeak NG copies the data path into a buffer of 160 characters

_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Synthesizer:
    """`say(word, accent, variant, rate, pitch)` gives a float32 wave in [-1, 1] at `sample_rate`.

    Raises MissingDataError when the library, its data or its voices are not what they should be.
    """

    def __init__(self) -> None:
        library, data = find()
        try:
            self._lib = ctypes.CDLL(str(library))
        except OSError as error:
            raise MissingDataError(
                f"speech: {library.name} does not load ({error}); {REMEDY}"
            ) from None
        self._lib.espeak_Info.restype = ctypes.c_char_p
        self._lib.espeak_Info.argtypes = [ctypes.c_void_p]
        self._lib.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self._link = _short_path(data)
        self.sample_rate: int = self._lib.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(self._link), _INITIALIZE_DONT_EXIT
        )
        if self.sample_rate <= 0:
            raise MissingDataError(f"speech: eSpeak NG rejects its data folder; {REMEDY}")
        self._lib.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self._lib.espeak_ng_SetRandSeed(1)  # whispering and breath; the clock seeds it otherwise
        self.version: str = self._lib.espeak_Info(None).decode()
        self.variants: tuple[str, ...] = tuple(sorted(os.listdir(data / "voices" / "!v")))
        if len(self.variants) < 10:
            raise MissingDataError(f"speech: only {len(self.variants)} voices found; {REMEDY}")
        self._pieces: list[np.ndarray] = []
        self._callback = _Callback(self._collect)  # kept: C holds no reference to it
        self._lib.espeak_SetSynthCallback(self._callback)
        self._voice = ""

    def _collect(self, wave, count: int, _events) -> int:
        if wave and count > 0:
            self._pieces.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0

    def say(self, word: str, accent: str, variant: str, rate: int, pitch: int) -> np.ndarray:
        """One word. `rate` in words a minute (80..450), `pitch` in 0..100."""
        voice = f"{accent}+{variant}"
        if voice != self._voice:
            if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
                raise MissingDataError(f"speech: eSpeak NG has no voice {voice}; {REMEDY}")
            self._voice = voice
        self._lib.espeak_SetParameter(_PARAMETER_RATE, rate, 0)
        self._lib.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
        self._pieces.clear()
        text = word.encode()
        status = self._lib.espeak_Synth(
            text, len(text) + 1, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        if status != 0 or self._lib.espeak_Synchronize() != 0 or not self._pieces:
            raise MissingDataError(
                f"speech: eSpeak NG said nothing for {word!r} ({voice}); {REMEDY}"
            )
        return np.concatenate(self._pieces).astype(np.float32) / 32768.0

    def close(self) -> None:
        """Free the synthesiser and the temporary link to its data."""
        self._lib.espeak_Terminate()
        if self._link.is_symlink():
            self._link.unlink()
            self._link.parent.rmdir()


def find() -> tuple[Path, Path]:
    """The library and its data folder. Raises MissingDataError when they are not there."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError(f"speech: the package espeakng-loader is not installed; {REMEDY}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    names = ("libespeak-ng.so", "libespeak-ng.dylib", "espeak-ng.dll")
    library = next((folder / name for name in names if (folder / name).is_file()), None)
    data = folder / "espeak-ng-data"
    if library is None or not (data / "voices" / "!v").is_dir():
        raise MissingDataError(
            f"speech: espeakng-loader has no library or no voices here; {REMEDY}"
        )
    return library, data


def _short_path(data: Path) -> Path:
    """A path that fits eSpeak NG's fixed buffer: the folder, or a link to it in the temp folder."""
    if len(os.fsencode(data)) <= _LONGEST_PATH:
        return data
    link = Path(tempfile.mkdtemp(prefix="mmfast-")) / data.name
    link.symlink_to(data, target_is_directory=True)
    return link
