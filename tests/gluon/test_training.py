"""Training as Gluon and GluonCV do it: gradients, decay, several contexts, compiled graphs, float16 and float64."""

import json

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.contrib import amp

from foldconv.gluon import DOConv2D, expand, fold

GEOMETRIES = [
    {"kernel_size": 3, "padding": (1, 1)},
    {"kernel_size": (2, 4), "strides": (1, 2), "padding": (1, 2), "depth_multiplier": 10},
    {"kernel_size": (1, 3), "groups": 2, "dilation": (1, 2), "use_bias": False},
    {"kernel_size": 3, "groups": 6, "depth_multiplier": 13, "activation": "tanh"},
]


def error(x, y):
    return float((abs(x - y).max() / abs(y).max()).asscalar())


def randomized(layer, x, scale=1.0):
    layer(x)
    for parameter in layer.collect_params().values():
        parameter.set_data(scale * mx.nd.random.normal(shape=parameter.shape, dtype=parameter.dtype))
    return layer


@pytest.mark.parametrize("arguments", GEOMETRIES)
@pytest.mark.parametrize("compiled", [None, {}, {"static_alloc": True, "static_shape": True}])
def test_gradients_are_those_of_finite_differences_in_float64(arguments, compiled):
    layer = DOConv2D(6, **arguments)
    layer.cast("float64")
    layer.initialize()
    if compiled is not None:
        layer.hybridize(**compiled)
    x = mx.nd.random.normal(shape=(2, 6, 6, 7), dtype="float64")
    randomized(layer, x)
    values = {"x": x, **{name: parameter.data() for name, parameter in layer._reg_params.items()}}
    x.attach_grad()
    probe = mx.nd.random.normal(shape=layer(x).shape, dtype="float64")
    with autograd.record():
        loss = (layer(x) * probe).sum()
    loss.backward()
    for name, value in values.items():
        found = value.grad
        direction, step = mx.nd.random.normal(shape=value.shape, dtype="float64"), 1e-6
        losses, kept = [], value.copy()
        for sign in (1, -1):
            value[:] = kept + sign * step * direction
            losses.append((layer(x) * probe).sum().asscalar())
        value[:] = kept
        expected = (losses[0] - losses[1]) / (2 * step)
        assert abs((found * direction).sum().asscalar() - expected) < 1e-6 * max(1, abs(expected)), name


@pytest.mark.parametrize("arguments", GEOMETRIES)
def test_folding_is_exact_in_float64(arguments):
    layer = DOConv2D(6, **arguments)
    layer.cast("float64")
    layer.initialize()
    x = mx.nd.random.normal(shape=(2, 6, 6, 7), dtype="float64")
    randomized(layer, x)
    folded = layer.fold()
    assert folded.weight.dtype == layer.weight.dtype
    assert error(folded(x), layer(x)) < 1e-10


def test_training_steps_are_the_same_in_every_mode_and_a_network_still_folds():
    x = mx.nd.random.normal(shape=(4, 3, 8, 8))
    target = mx.nd.array([0, 1, 2, 3])
    plain = gluon.nn.HybridSequential()
    plain.add(gluon.nn.Conv2D(8, 3), gluon.nn.BatchNorm(), gluon.nn.Activation("relu"), gluon.nn.Conv2D(4, 2, groups=2))
    plain.add(gluon.nn.GlobalAvgPool2D(), gluon.nn.Dense(4))
    plain.initialize(mx.init.Xavier())
    plain(x)
    trained = []
    for compiled in (None, {}, {"static_alloc": True, "static_shape": True}):
        rich = expand(plain, "doconv", depth_multiplier=11)
        for layer in (rich[0], rich[3]):  # what is drawn at random is to be the same in all modes
            layer.weight_extra.set_data(mx.nd.ones_like(layer.weight_extra.data()))
        if compiled is not None:
            rich.hybridize(**compiled)
        trainer = gluon.Trainer(rich.collect_params(), "sgd", {"learning_rate": 0.1, "momentum": 0.9, "wd": 1e-3})
        for _ in range(3):
            with autograd.record():
                loss = gluon.loss.SoftmaxCrossEntropyLoss()(rich(x), target)
            loss.backward()
            trainer.step(4)
        assert float(abs(rich[0].D.data()).max().asscalar()) > 0
        trained.append(rich)
        folded = fold(rich)
        assert error(folded(x), rich(x)) < 1e-5
        assert folded._active == rich._active  # as it was hybridized
    for rich in trained[1:]:
        for name, parameter in rich._collect_params_with_prefix().items():
            expected = trained[0]._collect_params_with_prefix()[name].data()
            assert float(abs(parameter.data() - expected).max().asscalar()) < 1e-5, name


def test_D_decays_as_weights_do_and_takes_over_their_multipliers():
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(4, 3, in_channels=2), gluon.nn.Conv2D(4, 3, in_channels=4))
    net.initialize()
    net[1].weight.lr_mult, net[1].weight.wd_mult = 0.5, 0.0
    rich = expand(net, "doconv", depth_multiplier=10)
    for parameter in rich.collect_params(".*beta|.*gamma|.*bias").values():  # GluonCV's --no-wd
        parameter.wd_mult = 0.0
    rich.initialize(mx.init.Xavier(), force_reinit=True)
    assert all(float(abs(layer.D.data()).max().asscalar()) == 0 for layer in rich)  # whatever draws the weights
    for parameter in rich.collect_params().values():
        parameter.set_data(mx.nd.ones(parameter.shape))
    trainer = gluon.Trainer(rich.collect_params(), "sgd", {"learning_rate": 0.1, "wd": 0.5})
    with autograd.record():
        loss = 0 * rich(mx.nd.ones((1, 2, 7, 7))).sum()  # the gradients are zero: only decay is left
    loss.backward()
    trainer.step(1)
    found = [{name: float(p.data().asnumpy().mean()) for name, p in layer._reg_params.items()} for layer in rich]
    assert found[0] == pytest.approx({"weight": 0.95, "D": 0.95, "weight_extra": 0.95, "bias": 1})
    assert found[1] == pytest.approx({"weight": 1, "D": 1, "weight_extra": 1, "bias": 1})
    assert rich[1].D.lr_mult == rich[1].weight_extra.lr_mult == 0.5


def test_two_contexts_train_together():
    contexts = [mx.cpu(0), mx.cpu(1)]
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(6, 3, in_channels=4), gluon.nn.Conv2D(4, 3))
    net.initialize(ctx=contexts)
    x = mx.nd.random.normal(shape=(4, 4, 8, 8))
    rich = expand(net, "doconv")
    rich.hybridize()
    one = expand(net, "doconv")  # the same batch on one context
    one.collect_params().reset_ctx(contexts[0])
    parts = gluon.utils.split_and_load(x, contexts)
    one(x)
    for part in parts:
        rich(part)
    for layer, other in zip(rich, one, strict=True):
        assert layer.D.list_ctx() == contexts
        for name, parameter in layer._reg_params.items():
            value = mx.nd.random.normal(shape=parameter.shape)
            parameter.set_data(value)
            other._reg_params[name].set_data(value)
    for block, batches in ((rich, parts), (one, [x])):
        trainer = gluon.Trainer(block.collect_params(), "sgd", {"learning_rate": 0.1})
        with autograd.record():
            losses = [(block(batch) ** 2).mean(axis=(1, 2, 3)).sum() for batch in batches]
        autograd.backward(losses)
        trainer.step(len(x))
    for layer, other in zip(rich, one, strict=True):
        for name, parameter in layer._reg_params.items():
            first, second = (parameter.data(context).asnumpy() for context in contexts)
            assert np.array_equal(first, second), name
            assert np.allclose(first, other._reg_params[name].data().asnumpy(), rtol=1e-4, atol=1e-4), name
    folded = fold(rich)
    assert [array.context for array in folded[0].weight.list_data()] == contexts
    for part in parts:
        assert error(folded(part), rich(part)) < 1e-5


def test_layers_made_with_shared_parameters_share_D():
    first = DOConv2D(4, 3, in_channels=4, padding=1, depth_multiplier=10)
    net = gluon.nn.HybridSequential()
    net.add(first, DOConv2D(4, 3, in_channels=4, padding=1, depth_multiplier=10, params=first.params))
    net.initialize()
    assert net[1].D is first.D
    assert net[1].weight_extra is first.weight_extra
    x = mx.nd.random.normal(shape=(1, 4, 6, 6))
    randomized(net, x, 0.3)
    folded = fold(net)
    assert folded[0].weight is folded[1].weight
    assert error(folded(x), net(x)) < 1e-5


class Recording:
    """``mx.nd``, with the convolution in float32 (MXNet has none in float16 on CPUs), noting what it was given."""

    def __init__(self):
        self.kernel = None

    def __getattr__(self, name):
        return getattr(mx.nd, name)

    def Convolution(self, x, weight, *bias, **arguments):
        self.kernel = weight
        wide = [array.astype("float32") for array in (x, weight, *bias)]
        return mx.nd.Convolution(*wide, **arguments).astype("float16")


@pytest.mark.parametrize("multiplier", [9, 12])
def test_float16_parameters_compose_in_float32(multiplier):
    """As GluonCV's ``net.cast('float16')`` makes them; the kernel is rounded once."""
    layer = DOConv2D(8, 3, in_channels=16, groups=2, depth_multiplier=multiplier)
    layer.initialize()
    randomized(layer, mx.nd.ones((1, 16, 5, 5)))
    layer.cast("float16")
    assert all(parameter.data().dtype == np.float16 for parameter in layer._reg_params.values())
    F = Recording()
    values = {name: parameter.data() for name, parameter in layer._reg_params.items()}
    assert layer.hybrid_forward(F, mx.nd.ones((1, 16, 5, 5), dtype="float16"), **values).dtype == np.float16
    folded = layer.fold()
    assert folded.weight.data().dtype == F.kernel.dtype == np.float16
    # Both are roundings of one kernel, so that they differ by a unit in the last place at most.
    exact, found = (value.asnumpy().astype(float) for value in (folded.weight.data(), F.kernel))
    assert (abs(found - exact) <= np.spacing(abs(exact).astype("float16")) + 1e-6).all()


def test_a_cast_before_the_first_input_reaches_D():
    layer = DOConv2D(6, 3)
    layer.initialize()
    layer.cast("float16")
    layer.infer_shape(mx.nd.ones((1, 4, 6, 6), dtype="float16"))
    assert (layer.D.shape, np.dtype(layer.D.dtype)) == ((4, 9, 9), np.float16)
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(4, 3, in_channels=2))
    net.initialize()
    net.cast("float16")
    assert expand(net, "doconv")[0].D.data().dtype == np.float16


def test_automatic_mixed_precision_composes_in_float32():
    """MXNet's AMP rewrites the graph: the convolution goes to float16, the composition does not."""
    layer = DOConv2D(6, 3, in_channels=4)
    graph = amp.convert_symbol(layer(mx.sym.var("data")), target_dtype="float16")
    internals = graph.get_internals()
    _, types, _ = internals.infer_type(data="float32")
    of = dict(zip(internals.list_outputs(), types, strict=True))
    operators = {node["name"]: node["op"] for node in json.loads(graph.tojson())["nodes"]}
    products = [name for name, operator in operators.items() if operator == "batch_dot"]
    convolutions = [name for name, operator in operators.items() if operator == "Convolution"]
    assert [of[f"{name}_output"] for name in products] == [np.float32]
    assert [of[f"{name}_output"] for name in convolutions] == [np.float16]
