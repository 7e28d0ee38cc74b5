"""What runs with several seeds say about two networks: paired differences, their interval, how many seeds it takes.

Runs are paired when the same seed gives both networks the same initial weights and the same order of the data.
What the seed does to both then cancels in the difference, which resolves more than the two means with their spreads.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections.abc import Sequence

from scipy.stats import t

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
    return bisect.bisect_left(range(high), True, lo=max(2, high // 2), key=resolves)


def _two_sided(confidence: float, degrees: int) -> float:
    """Student's t that is exceeded on either side with the rest of the probability together.

    >>> round(_two_sided(0.95, 3), 3)
    3.182
    """
    if not 0 < confidence < 1:
        raise UnsupportedError(f"confidence: expected a value between 0 and 1, such as 0.95, received {confidence}")
    return float(t.ppf((1 + confidence) / 2, degrees))
