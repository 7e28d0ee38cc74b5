"""Every method of Keras, through the battery; those with options, through what options can change."""

import pytest

from foldconv.keras import testing
from foldconv.keras.doconv import DOConv
from foldconv.keras.orepa import OREPA


@testing.parametrize_with_checks()
def test_conformance(method, check):
    check(method)


CHANGED = ["preserves_the_function", "folds_to_what_there_was", "is_made_again_from_its_config", "saves_and_loads"]
CHANGED += ["mixed_precision", "gradients_reach_every_parameter"]


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("method", [DOConv(depth_multiplier=12), OREPA(point=False)], ids=lambda m: m.name)
def test_options(method, name):
    testing.CHECKS[name](method)
