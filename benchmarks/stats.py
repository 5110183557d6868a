"""The statistics of the suite: quantiles, geometric means, how often to repeat."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Quantiles(NamedTuple):
    """Of a sample: its 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def quantile(sample: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the order statistics. Raises ValueError on an empty sample."""
    if not sample:
        raise ValueError("quantile: the sample is empty; measure at least once")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"quantile: fraction is {fraction}; expected 0..1")
    ordered = sorted(sample)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def quantiles(sample: Sequence[float]) -> Quantiles:
    """p20, p50 and p80 of a sample."""
    return Quantiles(*(quantile(sample, fraction) for fraction in (0.2, 0.5, 0.8)))


def geometric_mean(values: Iterable[float]) -> float | None:
    """`exp(mean(log x))`; None for no values. Raises ValueError unless all are positive."""
    values = list(values)
    if not values:
        return None
    if min(values) <= 0.0:
        raise ValueError(f"geometric_mean: {min(values)} is not positive")
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def repeats(cost_s: float, wanted_s: float, least: int, most: int) -> int:
    """How many runs of `cost_s` fit into `wanted_s`, between `least` and `most`."""
    if cost_s <= 0.0 or wanted_s / cost_s >= most:
        return most
    return max(least, int(wanted_s / cost_s))
