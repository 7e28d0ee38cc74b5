"""From samples to the numbers that are shown: ratios within a round, their median and quartiles."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; the quartiles of a list lie on or between its own values.

    >>> spread([4, 1, 3, 2, 5])
    {'median': 3, 'lower': 2.0, 'upper': 4.0}
    >>> spread([7.0])
    {'median': 7.0, 'lower': 7.0, 'upper': 7.0}
    """
    if len(values) == 1:
        return dict.fromkeys(("median", "lower", "upper"), values[0])
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "lower": lower, "upper": upper}


def ratios(samples: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """For each contestant the spread of its value divided by the baseline's in the same round.

    A slow moment of the machine hits all contestants of a round alike and cancels.

    Args:
        samples: one value per round for each contestant.
        baseline: the contestant that others are divided by; its own ratio is 1.

    >>> ratios({"plain": [1.0, 2.0, 4.0], "rich": [2.0, 5.0, 8.0]}, "plain")["rich"]["median"]
    2.0
    """
    base = samples[baseline]
    return {
        name: spread([value / other for value, other in zip(values, base, strict=True)])
        for name, values in samples.items()
    }
