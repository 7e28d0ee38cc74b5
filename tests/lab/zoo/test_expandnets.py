"""ExpandNets' SmallNets: the published code's layers, and its expanded networks from ours."""

import pytest
import torch

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.zoo import SmallNet


@pytest.mark.parametrize(
    ("name", "features", "total"),
    # The linear layer's inputs and the sum over the layers of Cifar_Tiny in the published cifar_tiny_3.py and _7.py.
    [("expandnets_3x3", 128, 15_050), ("expandnets_7x7", 512, 66_186)],
)
def test_layers_of_the_published_code(name, features, total):
    with torch.device("meta"):
        net = zoo.create(name)
    assert net.fc1.in_features == features
    assert sum(p.numel() for p in net.parameters()) == total


# The kernels that take the place of the second and the third convolution in the published expanded networks with r = 4:
# Cifar_Tiny_ExpandNet_cl of cifar_tiny_3.py, Cifar_Tiny_ExpandNet_ck of cifar_tiny_7.py; outputs, inputs, size.
CL_3X3 = {
    "conv2": [(32, 8, 1), (64, 32, 3), (16, 64, 1)],
    "conv3": [(64, 16, 1), (128, 64, 3), (32, 128, 1)],
}
CK_7X7 = {
    "conv2": [(32, 8, 3), (64, 32, 3), (16, 64, 3)],
    "conv3": [(64, 16, 3), (128, 64, 3), (32, 128, 3)],
}


@pytest.mark.parametrize(
    ("name", "chain", "published"), [("expandnets_3x3", "CL", CL_3X3), ("expandnets_7x7", "CK", CK_7X7)]
)
def test_expanded_it_has_the_published_kernels(name, chain, published):
    net = foldconv.expand(zoo.create(name), foldconv.ExpandNet(chain=chain), init="paper")
    for layer, kernels in published.items():
        shapes = [tuple(p.shape) for _, p in sorted(net.get_submodule(layer).named_parameters()) if p.ndim == 4]
        assert [shape[:3] for shape in shapes] == kernels


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_expands_and_folds_back(folds_back, kernel_size):
    folds_back(SmallNet(kernel_size))


def test_kernel_size_that_cannot_be():
    with pytest.raises(UnsupportedError, match="have 3 or 7, received 5"):
        SmallNet(5)
