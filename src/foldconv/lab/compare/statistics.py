"""What runs with several seeds say about two networks: paired differences, their interval, how many seeds it takes.

Runs are paired when the same seed gives both networks the same initial weights and the same order of the data.
What the seed does to both then cancels in the difference, which resolves more than the two means with their spreads.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from ...errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """The mean of paired differences and its confidence interval, in the unit of the samples.

    >>> PairedDifference(mean=2.5, low=0.446, high=4.554, std=1.291, pairs=4, confidence=0.95).resolved
    True
    """

    mean: float
    low: float
    high: float
    std: float
    """Of the single differences, not of their mean."""
    pairs: int
    confidence: float

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes zero, so that the sign of the difference is known at this confidence."""
        return self.low > 0 or self.high < 0


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """How much `second` exceeds `first`, with an interval from Student's t.

    Args:
        first: one value per seed, such as accuracies in percent.
        second: the values of the same seeds in the same order.
        confidence: probability with which the interval covers the true mean, between 0 and 1. It assumes that the
            differences are normally distributed.

    Raises:
        UnsupportedError: unequal lengths, fewer than two pairs, a value that is not finite, or a bad confidence.

    >>> difference = paired_difference([10, 10, 10, 10], [11, 12, 13, 14])
    >>> difference.mean, round(difference.low, 3), round(difference.high, 3), difference.resolved
    (2.5, 0.446, 4.554, True)
    """
    if len(first) != len(second):
        raise UnsupportedError(
            f"samples: expected as many of one as of the other, received {len(first)}, {len(second)}"
        )
    differences = [after - before for before, after in zip(first, second, strict=True)]
    if len(differences) < 2:
        raise UnsupportedError(f"samples: expected at least 2 pairs for an interval, received {len(differences)}")
    if not all(map(math.isfinite, differences)):
        raise UnsupportedError(f"samples: expected finite differences, received {differences}")
    mean, std = statistics.fmean(differences), statistics.stdev(differences)
    half = _two_sided(confidence, len(differences) - 1) * std / math.sqrt(len(differences))
    return PairedDifference(mean, mean - half, mean + half, std, len(differences), confidence)


def seeds_to_resolve(difference: float, std: float, confidence: float = 0.95) -> int:
    """The fewest seeds with which the interval around an observed `difference` would exclude zero.

    If the true difference is just that, half of such experiments will still miss it: plan with more.

    Args:
        difference: of the means, in any unit; its sign does not matter.
        std: standard deviation of the paired differences, in the same unit.
        confidence: of the interval, between 0 and 1.

    Raises:
        UnsupportedError: a difference of zero, a negative spread, values that are not finite, or a bad confidence.

    >>> seeds_to_resolve(0.75, 0.6), seeds_to_resolve(0.1, 0.6)
    (5, 141)
    """
    if not (math.isfinite(difference) and difference != 0 and math.isfinite(std) and std >= 0):
        raise UnsupportedError(
            f"seeds_to_resolve: expected a finite difference other than 0 and a finite spread ≥ 0, "
            f"received {difference}, {std}"
        )

    def resolves(count: int) -> bool:
        return _two_sided(confidence, count - 1) * std < abs(difference) * math.sqrt(count)

    high = 2
    while not resolves(high):
        high *= 2
    low = high // 2  # too few, or 1, of which there is no interval
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if resolves(middle) else (middle, high)
    return high


def t_quantile(probability: float, degrees: int) -> float:
    """The value below which Student's t lies with this probability.

    Args:
        probability: between 0 and 1, both excluded.
        degrees: of freedom, an integer ≥ 1.

    Raises:
        UnsupportedError: an argument outside its range.

    >>> [round(t_quantile(0.975, degrees), 3) for degrees in (1, 2, 3, 4, 19)]
    [12.706, 4.303, 3.182, 2.776, 2.093]
    """
    if not 0 < probability < 1 or degrees < 1:
        raise UnsupportedError(
            f"t_quantile: expected 0 < probability < 1 and degrees ≥ 1, received {probability}, {degrees}"
        )
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    if degrees > 1000:
        return _near_normal(statistics.NormalDist().inv_cdf(probability), degrees)
    # In the angle atan(t / √degrees) the whole half-line is an interval, which bisection halves until floats end.
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(high)


def _within(angle: float, degrees: int) -> float:
    """P(|T| ≤ √degrees · tan(angle)), a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _near_normal(z: float, degrees: int) -> float:
    """Student's quantile from the normal one, for many degrees of freedom (Abramowitz and Stegun, 26.7.5)."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def _two_sided(confidence: float, degrees: int) -> float:
    if not 0 < confidence < 1:
        raise UnsupportedError(f"confidence: expected a value between 0 and 1, such as 0.95, received {confidence}")
    return t_quantile((1 + confidence) / 2, degrees)
