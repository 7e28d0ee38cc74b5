"""Optimizer groups cover each trainable parameter once, with the decay it should have."""

import copy

import pytest
import torch
from torch import nn

import foldconv


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.LayerNorm((4, 2, 2)),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def names_by_decay(model, weight_decay=0.1):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = foldconv.parameter_groups(model, weight_decay)
    return {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in groups}


def test_plain_network():
    found = names_by_decay(network())
    assert found == {
        0.1: {"0.weight", "3.weight", "6.weight"},
        0.0: {"1.weight", "1.bias", "3.bias", "4.weight", "4.bias", "6.bias"},
    }


def test_expanded_network_decays_what_kernels_are_composed_from():
    found = names_by_decay(foldconv.expand(network(), "doconv"))
    assert found[0.1] == {"0.weight", "0.D", "3.weight", "3.D", "6.weight"}
    assert found[0.0] == {"1.weight", "1.bias", "3.bias", "4.weight", "4.bias", "6.bias"}


def test_the_layers_own_exemptions(monkeypatch):
    net = foldconv.expand(network(), "doconv")
    monkeypatch.setattr(foldconv.DOConv2d, "no_decay", frozenset({"D"}))
    assert {"0.D", "3.D"} <= names_by_decay(net)[0.0]


@pytest.mark.parametrize("expanded", [False, True])
def test_each_trainable_parameter_exactly_once(expanded):
    net = network()
    net.append(net[6])  # the same module twice
    net[3].weight.requires_grad_(False)
    net = foldconv.expand(net, "doconv") if expanded else net
    listed = [p for group in foldconv.parameter_groups(net, 0.1) for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for p in net.parameters() if p.requires_grad}


def test_tied_weights_come_once():
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    net[1].weight = net[0].weight
    groups = foldconv.parameter_groups(foldconv.expand(net, "doconv"), 0.1)
    assert [len(group["params"]) for group in groups] == [2, 2]  # weight and D; two biases


def test_empty_groups_are_left_out():
    assert foldconv.parameter_groups(nn.ReLU(), 0.1) == []
    assert len(foldconv.parameter_groups(nn.Conv2d(1, 1, 3, bias=False), 0.1)) == 1
    frozen = nn.Conv2d(1, 1, 3).requires_grad_(False)
    assert foldconv.parameter_groups(frozen, 0.1) == []


def test_optimizer_applies_the_decay_where_it_should():
    net = foldconv.expand(network(), "doconv")
    before = copy.deepcopy(dict(net.named_parameters()))
    optimizer = torch.optim.SGD(foldconv.parameter_groups(net, 0.5), lr=1.0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        decays = p.ndim > 1 and name != "4.weight"
        torch.testing.assert_close(p, before[name] * (0.5 if decays else 1.0), rtol=0, atol=0)


def test_regularization_is_a_scalar():
    for model in (network(), foldconv.expand(network(), "doconv"), nn.ReLU()):
        penalty = foldconv.regularization(model)
        assert penalty.shape == ()
        assert penalty.item() == 0.0


def test_regularization_sums_the_layers(monkeypatch):
    monkeypatch.setattr(foldconv.DOConv2d, "regularization", lambda self: self.weight.square().sum())
    net = foldconv.expand(network(), "doconv")
    net.append(net[3])  # shared: counted once
    penalty = foldconv.regularization(net)
    torch.testing.assert_close(penalty, net[0].weight.square().sum() + net[3].weight.square().sum())
    penalty.backward()
    assert net[3].weight.grad is not None
