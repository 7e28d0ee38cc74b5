"""`verify` looks into whatever a network returns, and says so where it cannot."""

import collections
import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import foldconv
from foldconv.network._outputs import apart, difference

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Named = collections.namedtuple("Named", "logits label")


@dataclasses.dataclass
class Output:
    logits: Any
    label: str = "a"


class Instances:
    """Fields behind a private dictionary, as detectron2's."""

    def __init__(self, fields):
        self._fields_of = fields


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits):
        self.logits = logits


class Ordered(collections.OrderedDict):
    """As transformers' outputs are."""


def array_of_objects(y):
    values = np.empty(2, dtype=object)
    values[1] = y
    return values


HOLDERS = {
    "tensor": lambda y: y,
    "dataclass": Output,
    "named tuple": lambda y: Named(y, "a"),
    "object": lambda y: Instances({"logits": y}),
    "slots": Slotted,
    "mapping": lambda y: Ordered(logits=y, other=None),
    "user's mapping": lambda y: collections.UserDict({"logits": y}),
    "deque": lambda y: collections.deque([y]),
    "array": lambda y: y.numpy(),
    "reversed array": lambda y: [y.numpy()[::-1]],
    "array of objects": array_of_objects,
    "number": lambda y: {"loss": y.sum().item()},
    "NumPy's number": lambda y: np.float32(y.sum()),
    "complex": lambda y: torch.complex(torch.ones_like(y), y),
    "sparse": lambda y: y.to_sparse(),
    "packed": lambda y: PackedSequence(y.flatten(), torch.ones(y.numel(), dtype=torch.int64)),
    "whole numbers": lambda y: (y * 1000).long(),
    "distribution": lambda y: torch.distributions.Normal(y, 1.0),
    "nested": lambda y: [Output({"a": (Named(y, 1), "b")})],
}


class Net(nn.Module):
    def __init__(self, wrap, factor):
        super().__init__()
        self.conv, self.wrap, self.factor = nn.Conv2d(3, 4, 3), wrap, factor

    def forward(self, x):
        return self.wrap(self.conv(x) * self.factor)


def test_every_output_is_looked_into():
    for kind, wrap in HOLDERS.items():
        rich = foldconv.expand(Net(wrap, 1.0), "doconv")
        plain = foldconv.fold(rich)
        assert foldconv.verify(rich, plain, X).ok(), kind
        plain.factor = 2.0
        report = foldconv.verify(rich, plain, X)
        assert not report.ok(), kind
        assert report.max_error > 0.1, kind


@pytest.mark.parametrize("wrap", [lambda y: "a label", lambda y: None, lambda y: [], lambda y: object(), lambda y: 3])
def test_nothing_to_compare_is_an_error(wrap):
    net = foldconv.expand(Net(wrap, 1.0), "doconv")
    with pytest.raises(foldconv.UnsupportedError, match=r"the output: nothing to compare in .*; wrap the network"):
        foldconv.verify(net, foldconv.fold(net), X)


def test_a_detector_that_finds_nothing_is_told_so():
    net = foldconv.expand(Net(lambda y: [{"boxes": y.new_zeros(0, 4)}], 1.0), "doconv")
    with pytest.raises(foldconv.UnsupportedError, match=r"its tensors are empty, .* inputs on which it finds"):
        foldconv.verify(net, foldconv.fold(net), X)


def test_other_structures_are_an_error():
    one = torch.ones(2)
    values = [
        one,
        [one],
        (one,),
        [one, one],
        {"a": one},
        {"b": one},
        {"a": one, "b": one},
        Output(one),
        Named(one, "a"),
    ]
    values += [Output(one, "b"), Named(one, "b"), [one, None], Slotted(one), Instances([one]), Instances({"a": one})]
    for a, b in itertools.permutations(values, 2):
        with pytest.raises(
            foldconv.UnsupportedError, match=r"the output.*: expected the structure of the first network"
        ):
            difference(a, b, "the output")
    with pytest.raises(foldconv.UnsupportedError, match=r"the output\.logits: expected the shape \(2,\), .* \(3,\)"):
        difference(Output(one), Output(torch.ones(3)), "the output")


def test_what_refers_to_itself_ends():
    ours, theirs = [torch.ones(2)], [torch.zeros(2)]
    ours.append(ours)
    theirs.append(theirs)
    assert difference(ours, theirs, "the output") == (1.0, 1.0)


def test_infinite_values_are_no_measure_of_others():
    masked = torch.tensor([1.0, -torch.inf, torch.nan])
    assert apart(masked, masked.clone(), 1e-6) is None
    other = torch.tensor([1.5, -torch.inf, torch.nan])
    assert apart(masked, other, 1e-6) == ": expected a difference of at most 1.0e-06, received 5.0e-01"
    assert apart(masked, torch.zeros(3), 1e-6) is not None
