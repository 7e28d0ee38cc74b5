"""Branches run in both modes; what they compute folds where their parameters are."""

import pytest
import torch
from torch import nn

import foldconv
from foldconv.algebra import Sum
from foldconv.testing import randomize


def layer(method):
    torch.manual_seed(0)
    net = foldconv.expand(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)), method)
    randomize(net.double().eval())
    return net[0]


@pytest.mark.parametrize("training", [True, False])
def test_every_branch_runs_and_is_seen(training):
    made, seen = layer("repvgg").train(training), set()
    for name, branch in made.body.named_children():
        branch.register_forward_hook(lambda *_, name=name: seen.add(name))
    with torch.no_grad():
        made(torch.randn(2, 4, 9, 8).double())
    assert seen == {"main", "point", "identity"}


@pytest.mark.parametrize("method", ["repvgg", "dbb"])
def test_gradients_in_evaluation_mode_are_those_of_the_fold(method):
    made = layer(method)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    (received,) = torch.autograd.grad(made(x).pow(3).sum(), x)
    (expected,) = torch.autograd.grad(foldconv.fold(made)(x).pow(3).sum(), x)
    torch.testing.assert_close(received, expected, rtol=1e-10, atol=1e-10)


def test_the_kernel_is_composed_where_the_parameters_are():
    assert layer("dbb").to("meta").to_kernel().weight.is_meta
    assert foldconv.FoldableBlock(Sum(nn.Conv2d(4, 4, 1), nn.Identity())).to("meta").to_kernel().weight.is_meta
