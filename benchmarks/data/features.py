"""Log-mel features in numpy: `20 log10` of mel-filtered power spectra, normalised per clip."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

WINDOW_S, HOP_S, MELS = 0.025, 0.010, 40


@lru_cache(maxsize=4)
def mel_filters(sample_rate: int, size: int, mels: int = MELS) -> np.ndarray:
    """Triangular filters `[mels, size//2+1]`, evenly spaced in mel = 2595 log10(1 + f/700)."""
    top = 2595.0 * np.log10(1.0 + sample_rate / 2 / 700.0)
    corners = 700.0 * (10.0 ** (np.linspace(0.0, top, mels + 2) / 2595.0) - 1.0)
    frequency = np.fft.rfftfreq(size, 1.0 / sample_rate)
    low, centre, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rise, fall = (frequency - low) / (centre - low), (high - frequency) / (high - centre)
    return np.maximum(0.0, np.minimum(rise, fall)).astype(np.float32)


def log_mel(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """`[frames, MELS]` float32; frames = 1 + (samples - window) // hop, at least one."""
    window, hop = round(WINDOW_S * sample_rate), round(HOP_S * sample_rate)
    if wave.size < window:
        wave = np.pad(wave, (0, window - wave.size))
    frames = np.lib.stride_tricks.sliding_window_view(wave, window)[::hop]
    size = 1 << (window - 1).bit_length()
    power = np.abs(np.fft.rfft(frames * np.hanning(window).astype(np.float32), size)) ** 2
    level = np.log10(power.astype(np.float32) @ mel_filters(sample_rate, size).T + 1e-6)
    return ((level - level.mean()) / (level.std() + 1e-5)).astype(np.float32)


def add_noise(wave: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """White noise at the given ratio of the clip's mean power to the noise's."""
    power = float(np.mean(wave**2)) / 10.0 ** (snr_db / 10.0)
    return wave + rng.standard_normal(wave.size, dtype=np.float32) * np.float32(np.sqrt(power))
