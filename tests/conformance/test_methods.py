"""Every registered method × every check of the battery."""

import pytest

import foldconv.testing
from foldconv.testing.cases import only_layer, typical


@foldconv.testing.parametrize_with_checks()
def test_conformance(method, check):
    check(method)


@pytest.mark.parametrize("check", ["the_penalty_is_a_scalar", "every_parameter_learns", "leaves_nothing_on_the_fold"])
@pytest.mark.parametrize(
    "method",
    [foldconv.RepVGG(custom_l2=0.5), foldconv.OREPAVGG(custom_l2=0.5), foldconv.DGConv(complexity_weight=0.5)],
    ids=str,
)
def test_methods_with_a_penalty(method, check):
    assert only_layer(foldconv.expand(typical(method).network(), method)).regularization() > 0
    foldconv.testing.CHECKS[check](method)
