"""Student's t against published tables, and the seeds that it asks for."""

import math

import pytest

from foldconv.errors import UnsupportedError
from foldconv.lab.compare.statistics import _two_sided, paired_difference, seeds_to_resolve

# Two-sided 95 % and 99 %, as printed in tables.
TABLE = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 5: (2.571, 4.032)}
TABLE |= {9: (2.262, 3.250), 10: (2.228, 3.169), 30: (2.042, 2.750), 60: (2.000, 2.660), 120: (1.980, 2.617)}


@pytest.mark.parametrize("degrees", TABLE)
def test_intervals_are_those_of_the_tables(degrees):
    differences = [(-1.0) ** n for n in range(degrees + 1)]
    for confidence, expected in zip((0.95, 0.99), TABLE[degrees]):
        found = paired_difference([0] * len(differences), differences, confidence)
        half = (found.high - found.low) / 2
        assert half * math.sqrt(len(differences)) / found.std == pytest.approx(expected, abs=5.1e-4)


def test_interval_of_known_differences():
    difference = paired_difference([5.0, 1.0, 7.0, 3.0], [6.0, 3.0, 10.0, 7.0])
    assert (difference.mean, difference.pairs) == (2.5, 4)
    assert (difference.low, difference.high) == pytest.approx((0.446, 4.554), abs=5e-4)
    assert difference.resolved
    assert not paired_difference([0, 0], [1, -1]).resolved
    assert paired_difference([3, 3], [1, 1]).resolved  # no spread: an interval of length zero below zero


@pytest.mark.parametrize(("difference", "std"), [(0.75, 0.6), (-0.75, 0.6), (0.1, 0.6), (5, 0.1), (1, 0), (0.02, 0.9)])
def test_fewer_seeds_would_not_resolve(difference, std):
    seeds = seeds_to_resolve(difference, std)

    def half(count):
        return _two_sided(0.95, count - 1) * std / math.sqrt(count)

    assert half(seeds) < abs(difference)
    assert seeds == 2 or half(seeds - 1) >= abs(difference)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_difference([1, 2], [1]), "as many of one as of the other, received 2, 1"),
        (lambda: paired_difference([1], [2]), "at least 2 pairs"),
        (lambda: paired_difference([1, 2], [1, math.nan]), "finite"),
        (lambda: paired_difference([1, 2], [1, 3], confidence=95), "between 0 and 1, such as 0.95, received 95"),
        (lambda: seeds_to_resolve(0, 1), "other than 0"),
        (lambda: seeds_to_resolve(1, -1), "spread ≥ 0"),
    ],
)
def test_what_has_no_answer_is_refused(call, message):
    with pytest.raises(UnsupportedError, match=message):
        call()
