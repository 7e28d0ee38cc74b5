"""CIFAR's ResNets: the sizes of the paper's table 6, and its shortcuts without parameters."""

import pytest
import torch
import torch.nn.functional as F

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.zoo.cifar_resnet import BasicBlock, CifarResNet

# Millions of parameters, He et al. (CVPR 2016), table 6; all but the last to two decimals.
PUBLISHED = {20: "0.27", 32: "0.46", 44: "0.66", 56: "0.85", 110: "1.7"}


@pytest.mark.parametrize("depth", PUBLISHED)
def test_as_many_parameters_as_published(depth):
    with torch.device("meta"):
        net = zoo.create(f"cifar_resnet{depth}")
    published = PUBLISHED[depth]
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert f"{millions:.{len(published) - 2}f}" == published
    assert sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in net.modules()) == depth


def test_shortcut_takes_every_second_pixel_and_adds_zeros():
    torch.manual_seed(0)
    block = BasicBlock(4, 8, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    torch.testing.assert_close(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_shortcut_within_a_stage_is_the_identity():
    block = BasicBlock(4, 4, stride=1).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(block(x), F.relu(x))


def test_expands_and_folds_back(folds_back):
    folds_back(CifarResNet(depth=14, width=4))


def test_folds_with_its_norms():
    torch.manual_seed(0)
    net = CifarResNet(depth=8, width=4).eval()
    folded = foldconv.fold(net, batchnorm=True)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [2, 9, 19])
def test_depth_must_fit_the_family(depth):
    with pytest.raises(UnsupportedError, match=f"6n \\+ 2.*received {depth}"):
        CifarResNet(depth)


def test_the_plain_network_is_the_same_without_shortcuts():
    net, residual = zoo.create("cifar_plain20"), zoo.create("cifar_resnet20")
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in residual.state_dict().items()}
    block = net.get_submodule("layer1.0").eval()
    torch.nn.init.zeros_(block.bn2.weight)
    assert not block(torch.rand(2, 16, 6, 6)).any()
