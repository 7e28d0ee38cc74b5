"""Decisions about a tree of modules hold until something in it changes, and not a moment longer."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from foldconv.methods._decided import MOST, decided


def _tree():
    return nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 3, bias=False), nn.BatchNorm2d(2)), nn.ReLU())


def _list_in_place(tree):
    tree[1].sizes[0] = 2


CHANGES = {
    "mode": lambda tree: tree[0][1].eval(),
    "attribute": lambda tree: setattr(tree[0][0], "stride", (2, 2)),
    "new attribute": lambda tree: setattr(tree[0][0], "forward", torch.relu),
    "list in place": _list_in_place,
    "array in place of a number": lambda tree: setattr(tree[0][1], "eps", torch.zeros(3)),
    "hook": lambda tree: tree[0][1].register_forward_hook(lambda *_: None),
    "pre-hook of the root": lambda tree: tree.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda tree: tree[1].register_full_backward_hook(lambda *_: None),
    "child": lambda tree: tree[0].__setitem__(1, nn.BatchNorm2d(2)),
    "further child": lambda tree: tree.append(nn.ReLU()),
    "no child": lambda tree: tree[0].__delitem__(1),
    "class": lambda tree: setattr(tree[1], "__class__", nn.Identity),
    "parameter": lambda tree: setattr(tree[0][0], "weight", nn.Parameter(torch.zeros(2, 2, 3, 3))),
    "none for a parameter": lambda tree: setattr(tree[0][1], "weight", None),
    "parameter for none": lambda tree: setattr(tree[0][0], "bias", nn.Parameter(torch.zeros(2))),
    "no parameter": lambda tree: tree[0][0].__delattr__("weight"),
    "type": lambda tree: tree[0][0].double(),
    "shape": lambda tree: setattr(tree[0][0].weight, "data", torch.zeros(1, 2, 3, 3)),
    "dict of parameters": lambda tree: vars(tree[0][1]).update(_parameters={}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_decided_anew(change):
    tree, asked = _tree(), []
    tree[1].sizes = [1]
    decide = lambda: asked.append(1) or len(asked)  # noqa: E731
    assert [decided(tree, "a", decide) for _ in range(3)] == [1, 1, 1]
    CHANGES[change](tree)
    assert decided(tree, "a", decide) == 2


def test_values_change_nothing():
    tree, asked = _tree(), []
    for _ in range(3):
        decided(tree, "a", lambda: asked.append(1))
        with torch.no_grad():
            tree[0](torch.randn(4, 2, 5, 5))
            tree[0][0].weight.add_(1)
    assert asked == [1]


def test_a_copy_decides_for_itself():
    tree = _tree()
    decided(tree, "a", lambda: "the original's")
    assert decided(copy.deepcopy(tree), "a", lambda: "its own") == "its own"
    assert decided(tree, "a", lambda: "another") == "the original's"


def test_keys():
    tree = _tree()
    assert [decided(tree, n, lambda n=n: n) for n in range(3 * MOST)] == list(range(3 * MOST))
    assert [decided(tree, n, lambda n=n: -1) for n in (3 * MOST - 1, 0)] == [3 * MOST - 1, -1]


def test_keeps_no_module_alive():
    tree = _tree()
    decided(tree, "a", tree[0].modules)
    gone = weakref.ref(tree)
    gc.disable()
    try:
        del tree
        assert gone() is None
    finally:
        gc.enable()
