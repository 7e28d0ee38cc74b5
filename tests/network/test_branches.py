"""`branches`: what a layer's branches are, that they add up to its kernel, and what is said about them."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import foldconv
from foldconv.algebra import Sum, kernel_of
from foldconv.errors import UnsupportedError
from foldconv.layers.terms import terms_of
from foldconv.methods import get_method, list_methods
from foldconv.network.branches import branches
from foldconv.network.tree import foldable_layers
from foldconv.testing.cases import cases, randomize

from ..algebra.trees import trees

EXACT = 1e-10


def only(net):
    (layer,) = foldable_layers(net).values()
    return layer


def assert_adds_up(kernels, whole):
    total = sum(kernel.weight for kernel in kernels.values())
    assert all(kernel.weight.shape == whole.weight.shape for kernel in kernels.values())
    assert (total - whole.weight).abs().max() <= EXACT * max(1, whole.weight.abs().max())


METHODS = [
    *list_methods(),
    foldconv.OREPA(point=False),
    foldconv.OREPA(large="orepa"),
    foldconv.DOConv(depth_multiplier=60),
    foldconv.ExpandNet(chain="CK"),
    foldconv.DGConv(sort=True),
    foldconv.MobileOne(conv_branches=2),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_branches_add_up_to_the_folded_kernel(method):
    method = get_method(method)() if isinstance(method, str) else method
    torch.manual_seed(0)
    for case in cases(method):
        net = foldconv.expand(case.network(), method, init="paper")
        randomize(net)
        layer = only(net)
        kernels = layer.branch_kernels()
        assert_adds_up(kernels, layer.to_kernel())
        assert all(kernel.weight.any() for kernel in kernels.values())  # none of them is there for show
    (found,) = branches(net).layers
    assert [branch.name for branch in found.branches] == list(kernels)
    assert math.fsum(branch.share or 0 for branch in found.branches) == pytest.approx(1, abs=EXACT)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(trees())
@torch.no_grad()
def test_branches_of_any_tree_add_up(drawn):
    tree, x = drawn
    whole = kernel_of(tree, in_channels=x.shape[1], ndim=x.dim() - 2)
    assert_adds_up(terms_of(tree, whole), whole)


BRANCHES = {
    "acnet": ["main", "vertical", "horizontal"],
    "dbb": ["main", "point", "average", "stack"],
    "dgconv": ["kernel"],
    "doconv": ["identity", "D"],
    "expandnet": ["kernel"],
    "mobileone": ["main", "conv2", "conv3", "conv4", "scale", "identity"],
    "orepa": ["origin", "average", "prior", "stack", "point", "separable"],
    "orepa_vgg": ["main.origin", "main.average", "main.prior", "main.stack", "main.separable", "point", "identity"],
    "qarepvgg": ["main", "point", "identity"],
    "repvgg": ["main", "point", "identity"],
}


@pytest.mark.parametrize("method", BRANCHES)
def test_names_of_the_branches(method):
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    (layer,) = branches(foldconv.expand(net, method)).layers
    assert [branch.name for branch in layer.branches] == BRANCHES[method]
    assert (layer.name, layer.method) == ("0", method)


def two_branches(first, second):
    """A layer of two pointwise branches with these kernels."""
    convs = [nn.Conv2d(1, len(values), 1, bias=False) for values in (first, second)]
    for conv, values in zip(convs, (first, second)):
        conv.weight.data = torch.tensor(values).reshape(-1, 1, 1, 1)
    return foldconv.FoldableBlock(Sum(a=convs[0], b=convs[1]))


def test_numbers_by_hand():
    (layer,) = branches(two_branches([3.0, 0.0], [0.0, 4.0])).layers  # orthogonal; the sum is of norm 5
    assert [branch.share for branch in layer.branches] == pytest.approx([9 / 25, 16 / 25])
    assert [branch.norm for branch in layer.branches] == pytest.approx([3 / 5, 4 / 5])
    assert layer.similarity == pytest.approx(0)
    (layer,) = branches(two_branches([3.0, 0.0], [-1.0, 0.0])).layers  # the second works against the sum
    assert [branch.share for branch in layer.branches] == pytest.approx([3 / 2, -1 / 2])
    assert layer.similarity == pytest.approx(-1)
    assert layer.method == ""


def test_what_is_not_defined_is_none():
    (layer,) = branches(two_branches([1.0], [0.0])).layers
    assert (layer.branches[1].share, layer.branches[1].norm) == (0, 0)
    assert layer.similarity is None
    (layer,) = branches(two_branches([1.0], [-1.0])).layers  # a kernel of zeros has no shares
    assert [branch.share for branch in layer.branches] == [None, None]
    (layer,) = branches(two_branches([float("nan")], [1.0])).layers
    assert layer.branches[0].share is None
    for first, second in ((math.nan, 1.0), (math.inf, -math.inf), (math.inf, 1.0)):  # a network that diverged
        json.dumps(branches(two_branches([first], [second])).to_json(), allow_nan=False)


def test_a_new_layer_is_its_first_branch_alone():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    for method in ("doconv", "orepa", "repvgg", "dbb"):
        (layer,) = branches(foldconv.expand(net, method)).layers
        assert [branch.share for branch in layer.branches] == [1, *[0] * (len(layer.branches) - 1)]


def test_degenerate_branches_have_similarity_one():
    net = foldconv.expand(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), foldconv.MobileOne(conv_branches=2))
    body = only(net).body
    with torch.no_grad():
        body.conv2.norm.weight.fill_(3.0)
        body.conv2.conv.weight.copy_(body.main.conv.weight)
    matrix = branches(net.eval()).layers[0].similarities
    assert matrix[0][1] == pytest.approx(1)


def test_distance_of_d_from_the_identity():
    net = foldconv.expand(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), foldconv.DOConv(depth_multiplier=10))
    assert branches(net).layers[0].identity_distance == 0
    only(net).D.data = 0.5 * torch.eye(9, 10).expand(4, 9, 10)
    assert branches(net).layers[0].identity_distance == pytest.approx(0.5)
    assert "0.500" in str(branches(net))


@pytest.mark.parametrize("values", [[1.0, 1.0], [-1.0, 1.0], [-1.0, -0.5]])
def test_groups_are_those_of_the_fold(values):
    net = foldconv.expand(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), foldconv.DGConv(sort=True))
    only(net).gates.data = torch.tensor(values)
    (layer,) = branches(net).layers
    assert layer.groups == foldconv.fold(net)[0].groups
    assert layer.gates == tuple(values)


class Measuring(foldconv.DOConv2d):
    """A layer that measures something new."""

    value = 0.25

    def measures(self):
        return {"entropy": self.value}


@pytest.mark.parametrize(
    ("value", "shown", "kept"),
    [(0.25, "0.250", 0.25), (3, "3", 3), ([1, 0.5], "1 0.500", (1, 0.5)), (math.nan, "-", None), (None, "-", None)],
)
def test_a_method_may_measure_anything_in_numbers(monkeypatch, value, shown, kept):
    monkeypatch.setattr(Measuring, "value", value)
    report = branches(nn.Sequential(Measuring(4, 8, 3), foldconv.DOConv2d(8, 8, 3)))
    assert report.layers[0].measures == {"entropy": kept}
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["layers"][1]["measures"] == {}
    head, _, first, *_ = str(report).splitlines()
    assert ("entropy" in head) == (kept is not None)
    assert first.split("  ")[-1].strip() == shown


def test_a_measure_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setattr(Measuring, "value", torch.zeros(2))
    with pytest.raises(UnsupportedError, match=r"0: its measures\(\) gives 'entropy': expected a number or .* Tensor"):
        branches(nn.Sequential(Measuring(4, 8, 3)))


def test_training_mode_and_state_stay_as_they_are():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    net = foldconv.expand(net, "orepa_vgg").train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    report = branches(net)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert report == branches(net.eval())


def test_a_sum_deeper_inside_a_branch_is_part_of_it():
    inner = nn.Sequential(Sum(nn.Conv2d(4, 4, 1), nn.Identity()), nn.Conv2d(4, 4, 3))
    block = foldconv.FoldableBlock(Sum(deep=inner, direct=Sum(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))))
    assert list(block.branch_kernels()) == ["deep", "direct.0", "direct.1"]


def test_a_network_without_branches_is_told_apart():
    with pytest.raises(UnsupportedError, match=r"Sequential has no foldable layer.*last\.ckpt"):
        branches(nn.Sequential(nn.Conv2d(1, 1, 1)))
