"""Plain RepVGG: the sizes of the paper (tables 4 and 5), and timm's network once it is expanded."""

import math

import pytest
import torch

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.zoo.repvgg import RepVGG

# Millions of parameters of the folded networks, tables 4 and 5 of the paper.
PUBLISHED = {
    "a0": 8.30,
    "a1": 12.78,
    "a2": 25.49,
    "b0": 14.33,
    "b1": 51.82,
    "b1g2": 41.36,
    "b1g4": 36.12,
    "b2": 80.31,
    "b2g4": 55.77,
    "b3": 110.96,
    "b3g4": 75.62,
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_folded_it_has_as_many_parameters_as_published(variant):
    with torch.device("meta"):
        net = foldconv.fold(zoo.create(f"plain_repvgg_{variant}"), batchnorm=True)
    # The paper cuts decimals off.
    assert math.floor(sum(p.numel() for p in net.parameters()) / 1e4) / 100 == PUBLISHED[variant]


@pytest.mark.parametrize("variant", ["a0", "b1g4"])
def test_expanded_it_is_timms_network(variant):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model(f"repvgg_{variant}")
        ours = foldconv.expand(zoo.create(f"plain_repvgg_{variant}"), "repvgg", init="paper")
    shapes = [sorted(tuple(p.shape) for p in net.parameters()) for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("depths", "widths"), [((1, 1, 1), (1,) * 4), ((1, 0, 1, 1), (1,) * 4), ((1,) * 4, (1,) * 3)])
def test_stages_that_cannot_be(depths, widths):
    with pytest.raises(UnsupportedError, match="expected four stages of at least one convolution, received depths"):
        RepVGG(depths, widths)
