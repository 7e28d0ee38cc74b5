"""What leaves the process: exported graphs and files of parameters, of expanded and of folded networks."""

import mxnet as mx
import pytest
from mxnet import gluon
from mxnet.gluon.model_zoo import vision

from foldconv.gluon import DOConv2D, expand, fold
from foldconv.gluon._tree import walk


def error(x, y):
    return float((abs(x - y).max() / abs(y).max()).asscalar())


def small(initialize=True):
    """Every kind of convolution: even, rectangular, grouped, depthwise, dilated, strided."""
    net = gluon.nn.HybridSequential()
    net.add(
        gluon.nn.Conv2D(6, (2, 4), strides=(1, 2), padding=(1, 2)),
        gluon.nn.BatchNorm(),
        gluon.nn.Activation("relu"),
        gluon.nn.Conv2D(6, (1, 3), groups=2, dilation=(1, 2), use_bias=False),
        gluon.nn.Conv2D(6, 3, groups=6, activation="tanh"),
        gluon.nn.Conv2D(8, 1),
        gluon.nn.Dense(3),
    )
    if initialize:
        net.initialize(mx.init.Xavier())
    return net, mx.nd.random.normal(shape=(2, 3, 12, 14))


def expanded(net, x, multiplier=10):
    """The expanded network, with random D and surplus taps."""
    rich = expand(net, "doconv", depth_multiplier=multiplier)
    rich(x)
    for layer in walk(rich):
        if isinstance(layer, DOConv2D):
            layer.D.set_data(0.3 * mx.nd.random.normal(shape=layer.D.shape))
    return rich


@pytest.mark.filterwarnings("ignore:Cannot decide type for the following arguments")  # MXNet says so of any layer
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("options", [{}, {"static_alloc": True, "static_shape": True}])
def test_a_graph_and_its_parameters_are_read_back_without_this_library(tmp_path, folded, options):
    net, x = small()
    rich = expanded(net, x)
    y = rich(x)
    block = fold(rich) if folded else rich
    block.hybridize(**options)
    assert error(block(x), y) < 1e-5
    block.export(str(tmp_path / "net"), epoch=3)
    files = [str(tmp_path / name) for name in ("net-symbol.json", "net-0003.params")]
    imported = gluon.SymbolBlock.imports(files[0], ["data"], files[1])
    assert error(imported(x), y) < 1e-5
    names = {name.removeprefix("arg:").removeprefix("aux:") for name in mx.nd.load(files[1])}
    assert names == set((net if folded else rich).collect_params())


def test_folded_parameters_load_into_the_original_and_plain_ones_into_the_expanded(tmp_path):
    net, x = small()
    expected = net(x)
    rich = expanded(net, x)
    y = rich(x)
    assert error(y, expected) > 1e-2
    net.save_parameters(str(tmp_path / "plain.params"))
    rich.save_parameters(str(tmp_path / "rich.params"))
    fold(rich).save_parameters(str(tmp_path / "folded.params"))
    net.load_parameters(str(tmp_path / "folded.params"))
    assert error(net(x), y) < 1e-5
    # A trained plain network is where training starts: D is zero, so nothing has changed yet.
    fresh = expand(small()[0], "doconv", depth_multiplier=10)
    fresh.load_parameters(str(tmp_path / "plain.params"), allow_missing=True)
    assert error(fresh(x), expected) < 1e-5
    # And training goes on where it stopped.
    fresh.load_parameters(str(tmp_path / "rich.params"))
    assert error(fresh(x), y) == 0


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_file_gives_shapes_and_values_where_nothing_was_initialized(tmp_path, hybrid):
    net, x = small(initialize=False)
    rich = expand(net, "doconv", depth_multiplier=10)
    if hybrid:
        rich.hybridize()
    trained = expanded(*small())
    trained.save_parameters(str(tmp_path / "rich.params"))
    rich.load_parameters(str(tmp_path / "rich.params"))
    assert error(rich(x), trained(x)) < 1e-6


@pytest.mark.parametrize("name", ["resnet18_v1", "resnet50_v2", "mobilenetv2_0.25"])
@pytest.mark.parametrize("hybrid", [False, True])
def test_networks_of_the_model_zoo_come_back_to_where_they_came_from(tmp_path, name, hybrid):
    net = vision.get_model(name, classes=5)
    net.initialize(mx.init.Xavier())
    x = mx.nd.random.normal(shape=(1, 3, 32, 32))
    expected = net(x)
    if hybrid:
        net.hybridize(static_alloc=True)
    rich = expand(net, "doconv")
    assert error(rich(x), expected) < 1e-6
    for layer in walk(rich):
        if isinstance(layer, DOConv2D):
            layer.D.set_data(0.1 * mx.nd.random.normal(shape=layer.D.shape))
    y = rich(x)
    assert error(y, expected) > 1e-3
    folded = fold(rich)
    assert error(folded(x), y) < 1e-4
    assert set(folded.collect_params()) == set(net.collect_params())
    folded.save_parameters(str(tmp_path / "folded.params"))
    net.load_parameters(str(tmp_path / "folded.params"))
    assert error(net(x), y) < 1e-4
