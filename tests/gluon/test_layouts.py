"""Layout NHWC. MXNet convolves it on GPUs only, so here its composition runs, with a convolution in NCHW behind it."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon

from foldconv.gluon import DOConv2D, expand, fold, import_checkpoint

GEOMETRIES = [
    {"kernel_size": 3, "padding": (1, 1)},
    {"kernel_size": (2, 3), "groups": 2, "depth_multiplier": 9, "strides": (2, 1)},
    {"kernel_size": 3, "groups": 6, "use_bias": False},
]


class ChannelsFirst:
    """``mx.nd``, with the convolution in NHWC written as transposes around the one in NCHW."""

    def __getattr__(self, name):
        return getattr(mx.nd, name)

    def Convolution(self, x, weight, *bias, layout, **arguments):
        assert layout == "NHWC"
        x, weight = x.transpose((0, 3, 1, 2)), weight.transpose((0, 3, 1, 2))
        return mx.nd.Convolution(x, weight, *bias, layout="NCHW", **arguments).transpose((0, 2, 3, 1))


def run(layer, x):
    """The layer's function on x in NHWC."""
    values = {name: parameter.data() for name, parameter in layer._reg_params.items()}
    return layer.hybrid_forward(ChannelsFirst(), x, **values)


def twins(arguments):
    """The same layer in both layouts, with random parameters, and an input for each."""
    first, last = DOConv2D(6, in_channels=6, **arguments), DOConv2D(6, in_channels=6, layout="NHWC", **arguments)
    for layer in (first, last):
        layer.initialize()
    for name, parameter in first._reg_params.items():
        value = mx.nd.random.normal(shape=parameter.shape)
        parameter.set_data(value)
        last._reg_params[name].set_data(value.transpose((0, 2, 3, 1)) if name == "weight" else value)
    x = mx.nd.random.normal(shape=(2, 6, 6, 7))
    return first, last, x, x.transpose((0, 2, 3, 1))


@pytest.mark.parametrize("arguments", GEOMETRIES)
def test_both_layouts_compute_the_same_and_learn_the_same(arguments):
    first, last, x, x_last = twins(arguments)
    for layer, function, inputs in ((first, first, x), (last, lambda x: run(last, x), x_last)):
        with autograd.record():
            y = function(inputs)
            loss = (y**2).sum()
        loss.backward()
        layer.y = y.asnumpy()
    assert np.allclose(last.y.transpose(0, 3, 1, 2), first.y, rtol=1e-5, atol=1e-4)
    for name, parameter in first._reg_params.items():
        expected, found = parameter.grad().asnumpy(), last._reg_params[name].grad().asnumpy()
        found = found.transpose(0, 3, 1, 2) if name == "weight" else found
        assert abs(found - expected).max() < 1e-5 * abs(expected).max(), name


@pytest.mark.parametrize("arguments", GEOMETRIES)
def test_folding_keeps_the_layout(arguments):
    first, last, _, _ = twins(arguments)
    folded = last.fold()
    assert type(folded) is gluon.nn.Conv2D
    assert folded._kwargs["layout"] == "NHWC"
    expected = first.fold().weight.data().asnumpy().transpose(0, 2, 3, 1)
    assert np.array_equal(folded.weight.data().asnumpy(), expected)


def test_shapes_are_inferred_and_layers_replaced():
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(8, 3, layout="NHWC"), gluon.nn.Conv2D(6, (2, 3), layout="NHWC", groups=2))
    net.initialize()
    rich = expand(net, "doconv", depth_multiplier=10)
    rich.infer_shape(mx.nd.ones((1, 9, 9, 5)))
    assert [layer.weight.shape for layer in rich] == [(8, 3, 3, 5), (6, 2, 3, 4)]
    assert [layer.D.shape for layer in rich] == [(5, 9, 10), (8, 6, 10)]
    assert [layer.weight_extra.shape for layer in rich] == [(8, 5, 1), (6, 4, 4)]
    assert [layer.weight.shape for layer in fold(rich)] == [(8, 3, 3, 5), (6, 2, 3, 4)]


@pytest.mark.parametrize("deferred", [False, True])
def test_weights_of_the_original_layer_are_transposed(deferred):
    random = np.random.default_rng(0)
    values = {"weight": random.normal(size=(4, 3, 3, 3)), "D": random.normal(size=(9, 9, 6)), "bias": np.ones(4)}
    arguments = {"groups": 2, **({} if deferred else {"in_channels": 6})}
    first, last = DOConv2D(4, 3, **arguments), DOConv2D(4, 3, layout="NHWC", **arguments)
    first, last = (import_checkpoint(values, layer, source="do-conv") for layer in (first, last))
    x = mx.nd.random.normal(shape=(2, 6, 6, 7))
    found = run(last, x.transpose((0, 2, 3, 1))).asnumpy().transpose(0, 3, 1, 2)
    assert np.allclose(found, first(x).asnumpy(), rtol=1e-5, atol=1e-4)
