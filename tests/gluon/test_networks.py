"""`expand` and `fold` on trees of blocks, the model zoo's among them."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon.model_zoo import vision

from foldconv.errors import NoMatchError, UnsupportedError
from foldconv.gluon import DOConv2D, expand, fold
from foldconv.gluon._tree import walk


def do_convs(block):
    return [layer for layer in walk(block) if isinstance(layer, DOConv2D)]


def error(x, y):
    return float((abs(x - y).max() / abs(y).max()).asscalar())


@pytest.mark.parametrize(("make", "count"), [(vision.resnet18_v1, 17), (vision.mobilenet_v2_1_0, 18)])
@pytest.mark.parametrize("called", [False, True], ids=["deferred", "initialized"])
def test_networks_of_the_model_zoo(tmp_path, make, count, called):
    mx.random.seed(0)
    net = make(classes=5)
    net.initialize(mx.init.Xavier())
    x = mx.nd.random.normal(shape=(2, 3, 48, 48))
    if called:
        net.hybridize()
        expected = net(x)
    rich = expand(net, "doconv")
    assert len(do_convs(rich)) == count
    assert not do_convs(net)
    if called:
        assert error(rich(x), expected) < 1e-5
    rich.hybridize()
    rich(x)
    for layer in do_convs(rich):
        layer.D.set_data(0.1 * mx.nd.random.normal(shape=layer.D.shape))
    y = rich(x)
    if called:
        assert error(y, expected) > 1e-3  # D changes the function, so that folding has something to do
    plain = fold(rich)
    assert not do_convs(plain)
    assert len(do_convs(rich)) == count
    assert error(plain(x), y) < 1e-4
    plain.save_parameters(str(tmp_path / "plain.params"))
    net.load_parameters(str(tmp_path / "plain.params"))
    assert error(net(x), y) < 1e-4


class Held(gluon.nn.HybridBlock):
    """A block that keeps its convolution in three places, and reads it in another than its children."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.conv = gluon.nn.Conv2D(4, 3, in_channels=4, padding=1)
        self.again = [self.conv]

    def hybrid_forward(self, F, x):
        return self.again[0](self.conv(x))


def test_every_reference_follows_and_the_copy_trains():
    net = Held()
    net.initialize()
    x = mx.nd.random.normal(shape=(1, 4, 6, 6))
    before = net(x)
    rich = expand(net, "doconv")
    assert type(rich.conv) is DOConv2D
    assert rich.again[0] is rich.conv
    assert rich._children["conv"] is rich.conv
    assert error(rich(x), before) < 1e-6
    trainer = gluon.Trainer(rich.collect_params(), "sgd", {"learning_rate": 0.1})
    with autograd.record():
        loss = (rich(x) ** 2).mean()
    loss.backward()
    trainer.step(1)
    assert abs(rich.conv.D.data()).max().asscalar() > 0
    assert error(rich(x), before) > 1e-4
    assert error(net(x), before) == 0
    folded = fold(rich)
    assert type(folded.again[0]) is gluon.nn.Conv2D
    assert folded.again[0] is folded.conv
    assert error(folded(x), rich(x)) < 1e-5
    assert set(folded.collect_params()) == set(net.collect_params())


def test_layers_that_share_a_weight_share_D_and_fold_once():
    first = gluon.nn.Conv2D(4, 3, in_channels=4, padding=1)
    net = gluon.nn.HybridSequential()
    net.add(first, gluon.nn.Conv2D(4, 3, in_channels=4, padding=1, params=first.params))
    net.initialize()
    x = mx.nd.random.normal(shape=(1, 4, 6, 6))
    rich = expand(net, "doconv")
    assert error(rich(x), net(x)) < 1e-6
    assert rich[0].weight is rich[1].weight
    assert rich[0].D is rich[1].D
    rich[0].D.set_data(mx.nd.random.normal(shape=rich[0].D.shape))
    rich.hybridize()
    assert error(fold(rich)(x), rich(x)) < 1e-5
    net[1].__class__ = DOConv2D  # one of two layers only: no kernel serves both
    net[1]._over_parameterize(None)
    with pytest.raises(UnsupportedError, match="used without this layer's D"):
        fold(net)


def test_a_frozen_weight_stays_frozen_and_hooks_stay():
    net = gluon.nn.Conv2D(4, 3, in_channels=2)
    net.initialize()
    net.weight.grad_req = "null"
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    rich = expand(net, "doconv", depth_multiplier=11)
    assert (rich.weight.grad_req, rich.bias.grad_req) == ("null", "write")
    assert rich.weight_extra.shape == (4, 2, 2)
    rich(mx.nd.ones((1, 2, 5, 5)))
    assert calls == [1]


def test_refusals():
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(4, 1), gluon.nn.Dense(3))
    with pytest.raises(NoMatchError, match="its kernel has one tap, where D would add nothing"):
        expand(net, "doconv")
    with pytest.raises(UnsupportedError, match=r"unknown method 'docnv'; did you mean 'doconv'\?"):
        expand(net, "docnv")
    net.add(gluon.nn.Conv2D(4, 3))
    with pytest.raises(UnsupportedError, match="depth_multiplier: expected an integer ≥ 9"):
        expand(net, "doconv", depth_multiplier=4)
    assert type(net[2]) is gluon.nn.Conv2D
    assert np.all([type(layer) is not DOConv2D for layer in fold(net)])
