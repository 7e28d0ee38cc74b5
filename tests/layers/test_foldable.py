"""What a rank class is told by its base."""

import inspect

import pytest
from torch import nn

import foldconv
from foldconv import methods
from foldconv.algebra.convolutions import PLAIN
from foldconv.layers.foldable import conv_arguments
from foldconv.layers.permuted import PERMUTED

RANKS = [
    cls
    for name in dir(foldconv)
    if isinstance(cls := getattr(foldconv, name), type) and issubclass(cls, PLAIN) and cls not in PLAIN
]


def test_the_rank_classes_are_found():
    made = {type(methods.as_method(m).expand(nn.Conv2d(8, 8, 7))) for m in methods.list_methods()}
    assert {cls for cls in made if issubclass(cls, PLAIN)} - {*RANKS} == set()
    assert {*PERMUTED.values()} <= {*RANKS}


@pytest.mark.parametrize("cls", RANKS, ids=lambda cls: cls.__name__)
def test_help_and_signature_tell_every_argument(cls):
    (plain,) = (base for base in cls.__bases__ if base in PLAIN)
    parameters = inspect.signature(cls).parameters
    torchs = inspect.signature(plain).parameters
    assert list(parameters)[: len(torchs)] == list(torchs)
    own = [name for name in parameters if name not in torchs]
    assert own
    line, *explained = cls.__doc__.splitlines()
    assert line.startswith(f"``nn.{plain.__name__}`` ")
    for name in own:
        assert any(row.startswith(f"    {name}: ") for row in explained), name
    for part in ("Args:", "Shapes:", "Raises:"):
        assert explained.count(part) == 1, part


def test_a_subclass_of_a_rank_class_keeps_its_own_docstring():
    class Mine(foldconv.DOConv2d):
        """Mine."""

    assert Mine.__doc__ == "Mine."
    assert inspect.signature(Mine).parameters.keys() == inspect.signature(foldconv.DOConv2d).parameters.keys()
    assert conv_arguments(Mine(1, 2, 3))["out_channels"] == 2
