"""Networks of GluonCV, where it is installed."""

import mxnet as mx
import pytest

from foldconv.gluon import DOConv2D, expand, fold
from foldconv.gluon._tree import walk

# GluonCV asks for torch or MXNet, and answers with an ImportError when one of its own requirements is missing.
model_zoo = pytest.importorskip("gluoncv.model_zoo", exc_type=ImportError)


def error(x, y):
    return float((abs(x - y).max() / abs(y).max()).asscalar())


# The networks of the DO-Conv paper's ImageNet table that GluonCV has, in their smallest size and in the paper's v1b-50;
# a dilated one, as its segmentation networks use; and one for small images.
@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        ("resnet18_v1b", {}, 17),
        ("resnet50_v1b", {}, 17),
        ("resnet18_v1b", {"dilated": True}, 17),
        ("resnet18_v2", {}, 17),
        ("resnext50_32x4d", {}, 17),
        ("mobilenet0.25", {}, 14),
        ("mobilenetv2_0.25", {}, 18),
        ("mobilenetv3_small", {}, 12),
        ("cifar_resnet20_v1", {}, 19),
    ],
)
def test_networks_expand_train_and_fold(tmp_path, name, arguments, count):
    net = model_zoo.get_model(name, pretrained=False, **arguments)
    net.initialize(mx.init.Xavier())
    net.hybridize()
    x = mx.nd.random.normal(shape=(3, 3, 32, 32))  # a norm of two values would pass no gradient on
    net(x)
    for gamma in net.collect_params(".*gamma").values():  # ResNeXt's residual branches start at zero
        gamma.set_data(mx.nd.ones(gamma.shape))
    expected = net(x)
    rich = expand(net, "doconv")
    layers = [layer for layer in walk(rich) if isinstance(layer, DOConv2D)]
    assert len(layers) == count
    assert error(rich(x), expected) < 1e-6
    trainer = mx.gluon.Trainer(rich.collect_params(), "sgd", {"learning_rate": 1e-3})
    with mx.autograd.record():
        loss = (rich(x) ** 2).mean()
    loss.backward()
    trainer.step(1)
    assert all(float(abs(layer.D.data()).max().asscalar()) > 0 for layer in layers)
    for layer in layers:
        layer.D.set_data(0.1 * mx.nd.random.normal(shape=layer.D.shape))
    y = rich(x)
    assert error(y, expected) > 1e-3
    folded = fold(rich)
    assert error(folded(x), y) < 1e-4
    folded.save_parameters(str(tmp_path / "folded.params"))
    net.load_parameters(str(tmp_path / "folded.params"))
    assert error(net(x), y) < 1e-4
