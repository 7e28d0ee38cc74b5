"""Ratios come from samples of the same round."""

import pytest

from foldconv.lab.bench.samples import ratios, spread


def test_a_ratio_is_the_median_over_rounds_not_the_ratio_of_medians():
    # The machine slows down tenfold in the last rounds; in every round the rich network takes twice or thrice as long.
    samples = {"plain": [1.0, 1.0, 10.0, 10.0, 10.0], "rich": [2.0, 3.0, 20.0, 20.0, 30.0]}
    found = ratios(samples, "plain")
    assert found["plain"] == {"median": 1.0, "lower": 1.0, "upper": 1.0}
    assert found["rich"] == {"median": 2.0, "lower": 2.0, "upper": 3.0}


def test_quartiles_are_interpolated_between_samples():
    assert spread([1.0, 2.0, 3.0, 4.0]) == {"median": 2.5, "lower": 1.75, "upper": 3.25}


def test_the_order_of_samples_does_not_matter_to_their_spread():
    assert spread([3.0, 1.0, 2.0]) == spread([1.0, 2.0, 3.0])


def test_rounds_must_match():
    with pytest.raises(ValueError, match="zip"):
        ratios({"plain": [1.0, 2.0], "rich": [1.0]}, "plain")
