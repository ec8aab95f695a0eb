"""Means over seeds, with the interval that so few of them allow."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Args:
        mean: of the values.
        half_width: the interval is ``mean +- half_width``; None where one value tells of no spread.
        count: how many values, at least 1.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half_width is None else self.mean + self.half_width


def estimate(values: Sequence[float]) -> Estimate | None:
    """Estimate the mean of independent values: ``mean +- t(0.975, n - 1) s / sqrt(n)``.

    **Source** Student, "The probable error of a mean", Biometrika 6 (1908).

    Returns:
        None without values.
    """
    if not values:
        return None
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Estimate(mean, None, 1)
    return Estimate(mean, t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count), count)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Estimate the mean of ``values - baseline`` over the seeds that both have.

    What a seed does to both of them drops out, so the interval is that of the differences.

    Args:
        values: by seed.
        baseline: by seed.

    Returns:
        None where they share no seed.
    """
    shared = sorted(values.keys() & baseline.keys())
    return estimate([values[seed] - baseline[seed] for seed in shared])


@cache
def t_quantile(degrees: int) -> float:
    """Find t with ``P(-t < T < t) = 0.95`` for Student's distribution.

    **Source** the finite sums for whole degrees of freedom: Abramowitz and Stegun, eqs. 26.7.3 and 26.7.4.

    Args:
        degrees: of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(degrees)
    for _ in range(80):
        angle = (low + high) / 2
        low, high = (angle, high) if _central_share(angle, degrees) < CONFIDENCE else (low, angle)
    return math.tan(low) * math.sqrt(degrees)


def _central_share(angle: float, degrees: int) -> float:
    """Give P(-t < T < t) for ``t = sqrt(degrees) tan(angle)``."""
    is_odd = degrees % 2
    term = total = math.cos(angle) if is_odd else 1.0
    for number in range(3 if is_odd else 2, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (number - 1) / number
        total += term
    if is_odd:
        return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))
    return math.sin(angle) * total
