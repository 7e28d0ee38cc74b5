"""The layer: its function, its arguments, its way through Gluon's machinery."""

import json
import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon

from foldconv.errors import FoldMismatchError, UnsupportedError
from foldconv.gluon import DOConv2D

GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "strides": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"kernel_size": 3, "groups": 2, "depth_multiplier": 12, "activation": "tanh"},
    {"kernel_size": 3, "groups": 6, "use_bias": False},
    {"kernel_size": 1},
]


def random_layer(**arguments):
    """A layer with random parameters (its shapes known by a first call) and an input."""
    x = mx.nd.random.normal(shape=(2, 6, 9, 8))
    layer = DOConv2D(6, **arguments)
    layer.initialize()
    layer(x)
    for parameter in layer.collect_params().values():
        parameter.set_data(mx.nd.random.normal(shape=parameter.shape))
    return layer, x


def largest(x):
    return float(abs(x).max().asscalar())


@pytest.mark.parametrize("arguments", GEOMETRIES)
def test_the_function_is_that_of_the_composed_kernel(arguments):
    layer, x = random_layer(**arguments)
    weight = layer.weight.data().asnumpy().astype(float)
    out, per_group = weight.shape[:2]
    groups = arguments.get("groups", 1)
    kernel = weight.copy()
    if layer.D is not None:
        D, taps = layer.D.data().asnumpy().astype(float), weight.reshape(out, per_group, -1)
        if layer.weight_extra is not None:
            taps = np.concatenate([taps, layer.weight_extra.data().asnumpy()], axis=2)
        for o in range(out):
            for i in range(per_group):
                channel = o // (out // groups) * per_group + i
                kernel[o, i] += (D[channel] @ taps[o, i]).reshape(kernel[o, i].shape)
    plain = gluon.nn.Conv2D(6, **{k: v for k, v in arguments.items() if k != "depth_multiplier"})
    plain.initialize()
    plain(x)
    plain.weight.set_data(kernel)
    if plain.bias is not None:
        plain.bias.set_data(layer.bias.data())
    expected = plain(x)
    scale = largest(expected)
    assert largest(layer(x) - expected) < 1e-5 * scale
    layer.hybridize()
    assert largest(layer(x) - expected) < 1e-5 * scale
    folded = layer.fold()
    assert type(folded) is gluon.nn.Conv2D
    assert largest(folded(x) - expected) < 1e-5 * scale
    assert set(folded._collect_params_with_prefix()) == set(plain._collect_params_with_prefix())
    assert np.allclose(folded.weight.data().asnumpy(), kernel, rtol=1e-6, atol=1e-6)
    assert type(layer) is DOConv2D
    assert np.array_equal(layer.weight.data().asnumpy(), weight.astype("float32"))


def test_it_starts_as_the_plain_convolution_and_one_tap_has_no_D():
    layer = DOConv2D(6, 3, in_channels=4, depth_multiplier=11)
    layer.initialize()
    x = mx.nd.random.normal(shape=(1, 4, 6, 6))
    assert (
        largest(layer(x) - mx.nd.Convolution(x, layer.weight.data(), layer.bias.data(), kernel=(3, 3), num_filter=6))
        == 0
    )
    assert layer.weight_extra.shape == (6, 4, 2)
    assert 0 < largest(layer.weight_extra.data()) <= 1 / 6
    assert set(DOConv2D(6, 1)._reg_params) == {"weight", "bias"}


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("multiplier", [None, 12])
def test_input_channels_may_be_left_to_the_first_input(hybrid, multiplier):
    net = gluon.nn.HybridSequential()
    net.add(DOConv2D(4, 3, depth_multiplier=multiplier), DOConv2D(6, 3, groups=2, depth_multiplier=multiplier))
    net.initialize()
    if hybrid:
        net.hybridize()
    assert net(mx.nd.ones((1, 3, 8, 8))).shape == (1, 6, 4, 4)
    assert [layer.D.shape for layer in net] == [(3, 9, multiplier or 9), (4, 9, multiplier or 9)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth_multiplier": 8}, "depth_multiplier: expected an integer ≥ 9.*received 8"),
        ({"depth_multiplier": 9.0}, "received 9.0"),
    ],
)
def test_what_has_no_exact_meaning_is_refused_in_one_line(arguments, message):
    with pytest.raises(UnsupportedError, match=message) as caught:
        DOConv2D(4, 3, **arguments)
    assert "\n" not in str(caught.value)


def test_a_kernel_that_is_not_finite_does_not_fold():
    layer, _ = random_layer(kernel_size=3)
    layer.D.set_data(mx.nd.full(layer.D.shape, np.nan))
    with pytest.raises(FoldMismatchError, match="expected a finite kernel, found 324 of 324"):
        layer.fold()


@pytest.mark.filterwarnings("ignore:Cannot decide type for the following arguments")  # MXNet says so of any layer
@pytest.mark.parametrize("arguments", GEOMETRIES)
def test_an_exported_graph_computes_the_same(tmp_path, arguments):
    layer, x = random_layer(**arguments)
    layer.hybridize()
    y = layer(x)
    layer.export(str(tmp_path / "net"))
    files = [str(tmp_path / name) for name in ("net-symbol.json", "net-0000.params")]
    imported = gluon.SymbolBlock.imports(files[0], ["data"], files[1])
    assert largest(imported(x) - y) == 0


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_trainer_trains_all_parameters_and_a_file_keeps_them(tmp_path, hybrid):
    layer, x = random_layer(kernel_size=3, groups=2, depth_multiplier=12)
    if hybrid:
        layer.hybridize()
    before = {name: p.data().asnumpy() for name, p in layer.collect_params().items()}
    target = mx.nd.random.normal(shape=layer(x).shape)
    trainer = gluon.Trainer(layer.collect_params(), "sgd", {"learning_rate": 1e-4})
    losses = []
    for _ in range(5):
        with autograd.record():
            loss = ((layer(x) - target) ** 2).mean()
        loss.backward()
        trainer.step(1)
        losses.append(float(loss.asscalar()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert len(before) == 4
    assert not any(np.array_equal(p.data().asnumpy(), before[name]) for name, p in layer.collect_params().items())
    layer.save_parameters(str(tmp_path / "w.params"))
    other = DOConv2D(6, 3, groups=2, depth_multiplier=12)
    other.load_parameters(str(tmp_path / "w.params"))
    assert largest(other(x) - layer(x)) == 0
    assert largest(layer.fold()(x) - layer(x)) < 1e-4 * largest(layer(x))  # the fold of a layer with a trainer


def modules_after(code):
    command = f"{code}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", command], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_each_part_imports_its_own_framework_only():
    loaded = modules_after("import foldconv.gluon")
    assert "mxnet" in loaded
    assert not loaded & {"torch", "keras", "tensorflow"}
    assert "mxnet" not in modules_after("import foldconv")
