"""Cifar-quick: the layers of Caffe's prototxt and of ACNet's code."""

import pytest
import torch
import torch.nn.functional as F

from foldconv.lab import zoo
from foldconv.lab.zoo import CifarQuick


def test_parameters_of_caffes():
    # Neither Caffe nor a paper states the number: these are the shapes that the prototxt's layers make.
    layers = {"conv1.conv": (32, 3, 5, 5), "conv2.conv": (32, 32, 5, 5), "conv3.conv": (64, 32, 5, 5)}
    layers.update({"fc1": (64, 64 * 4 * 4), "fc2": (10, 64)})
    expected = {f"{name}.weight": shape for name, shape in layers.items()}
    expected.update({f"{name}.bias": shape[:1] for name, shape in layers.items()})
    shapes = {key: tuple(value.shape) for key, value in zoo.create("cifar_quick").state_dict().items()}
    assert shapes == expected


def test_pooled_sizes_are_those_that_caffe_prints():
    net = zoo.create("cifar_quick")
    seen = []
    for index in (1, 2, 3):
        net.get_submodule(f"pool{index}").register_forward_hook(lambda _, __, y: seen.append(tuple(y.shape)))
    net(torch.zeros(100, 3, 32, 32))
    # "Top shape" of pool1, pool2 and pool3 in the log of Caffe's example, with its batch of 100.
    assert seen == [(100, 32, 16, 16), (100, 32, 8, 8), (100, 64, 4, 4)]


def test_average_at_the_border_is_of_the_pixels_there_are():
    pool = CifarQuick().pool2
    y = pool(torch.ones(1, 1, 16, 16))
    torch.testing.assert_close(y, torch.ones(1, 1, 8, 8))


def test_function_is_the_published_codes():
    """The steps of ACNet's ``CFQKBN`` written out."""
    torch.manual_seed(0)
    net = zoo.create("cifar_quick_bn").double().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    y = F.max_pool2d(F.relu(net.conv1.bn(F.conv2d(x, net.conv1.conv.weight, None, 1, 2))), 3, 2)
    y = F.avg_pool2d(F.relu(net.conv2.bn(F.conv2d(y, net.conv2.conv.weight, None, 1, 2))), 3, 2)
    y = F.avg_pool2d(F.relu(net.conv3.bn(F.conv2d(y, net.conv3.conv.weight, None, 1, 2))), 3, 2)
    torch.testing.assert_close(net(x), net.fc2(F.relu(net.fc1(y.flatten(1)))))


@pytest.mark.parametrize("batchnorm", [False, True])
def test_expands_and_folds_back(folds_back, batchnorm):
    folds_back(CifarQuick(batchnorm=batchnorm))
