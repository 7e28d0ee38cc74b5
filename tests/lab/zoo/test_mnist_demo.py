"""The networks of DO-Conv's MNIST demonstrations: layers, shapes and where the weights start."""

import math

import pytest
import torch
from torch import nn

import foldconv
from foldconv.lab import zoo


@pytest.mark.parametrize(
    ("name", "total"),
    # Summed up from the layers of sample_pt.py, sample_tf.py and sample_gluoncv.py; the last one is Caffe's LeNet.
    [
        ("mnist_demo", 160 + 2320 + 1450),
        ("mnist_demo_tensorflow", 320 + 2312 + 46_090),
        ("mnist_demo_gluon", 520 + 25_050 + 400_500 + 5_010),
    ],
)
def test_layers_of_the_published_code(name, total):
    net = zoo.create(name)
    assert sum(p.numel() for p in net.parameters()) == total
    assert zoo.input_shape(net) == (1, 28, 28)
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert zoo.create(name, num_classes=7, in_channels=3)(torch.zeros(2, 3, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "magnitude"),
    [("mnist_demo_tensorflow", 3.0), ("mnist_demo_gluon", 2.24)],  # Glorot's uniform distribution is Xavier's with 3
)
def test_weights_are_drawn_as_in_the_framework(name, magnitude):
    """Uniform up to the root of magnitude / mean of fan-in and fan-out, each times the taps; biases are zero."""
    torch.manual_seed(0)
    layers = [module for module in zoo.create(name).modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) in (3, 4)
    for layer in layers:
        taps = layer.weight[0, 0].numel()
        bound = math.sqrt(magnitude / ((layer.weight.shape[0] + layer.weight.shape[1]) * taps / 2))
        assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert layer.bias is not None
        assert not layer.bias.any()


def test_the_logits_of_gluons_are_behind_a_tangent_and_those_of_keras_are_not():
    images = torch.randn(16, 1, 28, 28) * 100
    assert float(zoo.create("mnist_demo_gluon")(images).detach().abs().max()) <= 1
    assert float(zoo.create("mnist_demo_tensorflow")(images).detach().abs().max()) > 1


@pytest.mark.parametrize("name", ["mnist_demo", "mnist_demo_tensorflow", "mnist_demo_gluon"])
def test_doconv_starts_as_the_network_itself_and_folds_back(name, folds_back):
    torch.manual_seed(0)
    net = zoo.create(name).eval()
    images = torch.rand(4, 1, 28, 28)
    expected = net(images)
    rich = foldconv.expand(net, "doconv", init="preserve").eval()
    torch.testing.assert_close(rich(images), expected)
    folds_back(zoo.create(name))
