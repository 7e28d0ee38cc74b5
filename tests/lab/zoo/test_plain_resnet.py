"""Plain-18 and 34: torchvision's networks without their shortcuts."""

import types

import pytest
import torch

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.zoo import PlainNet

torchvision = pytest.importorskip("torchvision")

# Multiply-adds in thousands of millions, He et al. (CVPR 2016), table 1: the plain networks cost what the residual do.
PUBLISHED = {"plain18": "1.8", "plain34": "3.6"}


def without_shortcut(block, x):
    """The forward of torchvision's BasicBlock, its sum left out."""
    return block.relu(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x))))))


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_what_is_published(name):
    with torch.device("meta"):
        costs = foldconv.summary(zoo.create(name), (1, 3, 224, 224))
    assert f"{costs.macs_folded / 1e9:.1f}" == PUBLISHED[name]


@pytest.mark.parametrize(("name", "parameters"), [("plain18", 11_689_512), ("plain34", 21_797_672)])
def test_as_many_parameters_as_resnets_without_shortcuts(name, parameters):
    with torch.device("meta"):
        ours, theirs = zoo.create(name), torchvision.models.get_model(name.replace("plain", "resnet"))
    # torchvision's documentation states the number of the residual one.
    assert sum(p.numel() for p in theirs.parameters()) == parameters
    shortcuts = sum(p.numel() for key, p in theirs.named_parameters() if "downsample" in key)
    assert sum(p.numel() for p in ours.parameters()) == parameters - shortcuts


def test_function_is_resnets_without_shortcuts():
    torch.manual_seed(0)
    resnet = torchvision.models.resnet
    theirs = resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], 10).double().eval()
    for block in (module for module in theirs.modules() if isinstance(module, resnet.BasicBlock)):
        block.forward = types.MethodType(without_shortcut, block)
        block.downsample = None
    ours = PlainNet((1, 2, 1, 1), num_classes=10).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_expands_and_folds_back(folds_back):
    folds_back(PlainNet((1, 1, 1, 1), width=4))


def test_stages_that_cannot_be():
    with pytest.raises(UnsupportedError, match=r"expected four stages of at least one block, received \(1, 2\)"):
        PlainNet((1, 2))
