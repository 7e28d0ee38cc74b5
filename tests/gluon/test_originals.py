"""Weights of the original Gluon layer: its function and gradients, as it computed them itself."""

import ast
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon

from foldconv.errors import CheckpointError, UnsupportedError
from foldconv.gluon import DOConv2D, expand, fold, import_checkpoint

GOLDENS = Path(__file__).parent.parent / "fixtures" / "goldens"


@pytest.mark.parametrize("name", ["3x3", "depthwise", "1x1"])
@pytest.mark.parametrize("deferred", [False, True])
def test_the_original_layer_lives_on(name, deferred):
    with np.load(GOLDENS / f"gluon_doconv_{name}.npz") as file:
        golden = {key: file[key] for key in file}
    arguments = ast.literal_eval(str(golden["arguments"]))
    if deferred:
        del arguments["in_channels"]
    layer = DOConv2D(**arguments)
    state = {key.removeprefix("state."): golden[key] for key in golden if key.startswith("state.")}
    layer = import_checkpoint(state, layer, source="do-conv")
    x = mx.nd.array(golden["input"])
    with autograd.record():
        y = layer(x)
        loss = (y * mx.nd.array(golden["probe"])).sum()
    loss.backward()
    found = {"output": y.asnumpy()}
    found |= {f"grad.{key}": layer._reg_params[key].grad().asnumpy() for key in state}
    if "D" in state:
        found["grad.D"] = found["grad.D"].transpose(1, 2, 0)
    for key, value in found.items():
        assert abs(value - golden[key]).max() < 1e-5 * abs(golden[key]).max(), key


def test_groups_keep_the_originals_pairing_of_channels():
    taps, channels, groups, out = 9, 6, 2, 4
    random = np.random.default_rng(0)
    weight = random.normal(size=(out, channels // groups, 3, 3)).astype("float32")
    D = random.normal(size=(taps, taps, channels)).astype("float32")
    # The original's own reshapes, from its hybrid_forward.
    W = weight.transpose(2, 3, 1, 0).reshape(taps, channels, -1)
    composed = np.einsum("msi,sio->mio", D + np.eye(taps)[..., None], W)
    kernel = composed.reshape(3, 3, channels // groups, out).transpose(3, 2, 0, 1)
    plain = gluon.nn.Conv2D(out, 3, groups=groups, use_bias=False)
    layer = import_checkpoint({"weight": weight, "D": D}, plain, source="do-conv")
    assert type(layer) is DOConv2D
    assert type(plain) is gluon.nn.Conv2D
    assert np.allclose(layer.fold().weight.data().asnumpy(), kernel, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("D"), "of its 3 parameters; missing: D; superfluous: nothing"),
        (lambda v: v.update(D=np.zeros((4, 9, 9))), r"D: expected \(9, 9, 4\), received \(4, 9, 9\)"),
        (
            lambda v: v.update(weight=np.zeros((2, 3, 3, 3))),
            r"weight: expected \(2, 4, 3, 3\), received \(2, 3, 3, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    layer = DOConv2D(2, 3, in_channels=4)
    layer.initialize()
    before = layer.weight.data().asnumpy()
    values = {"weight": np.ones((2, 4, 3, 3)), "D": np.zeros((9, 9, 4)), "bias": np.zeros(2)}
    change(values)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(values, layer, "do-conv")
    assert np.array_equal(layer.weight.data().asnumpy(), before)


def original_network():
    """A plain network, and the arrays of its parameters as the original layers would save them; D is random."""
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(4, 3), gluon.nn.BatchNorm(), gluon.nn.Conv2D(6, 1), gluon.nn.Conv2D(4, 3, groups=2))
    net.add(gluon.nn.Dense(3))
    plain = expand(net, "doconv")
    plain.initialize()
    x = mx.nd.random.normal(shape=(2, 3, 8, 8))
    plain(x)
    values = {
        name: mx.nd.random.uniform(0.1, 1, shape=parameter.shape)
        for name, parameter in plain._collect_params_with_prefix().items()
    }
    values |= {name: value.transpose((1, 2, 0)) for name, value in values.items() if name.endswith(".D")}
    return net, values, x


@pytest.mark.parametrize("called", [False, True])
def test_a_file_of_a_whole_network(tmp_path, called):
    net, values, x = original_network()
    mx.nd.save(str(tmp_path / "original.params"), values)
    rich = expand(net, "doconv")
    if called:
        rich.initialize()
        rich(x)
    rich = import_checkpoint(tmp_path / "original.params", rich, source="do-conv")
    again = import_checkpoint(mx.nd.load(str(tmp_path / "original.params")), net, source="do-conv")
    assert np.array_equal(rich(x).asnumpy(), again(x).asnumpy())
    for index in (0, 3):
        own = {name: values[f"{index}.{name}"] for name in ("weight", "bias", "D")}
        alone = import_checkpoint(own, gluon.nn.Conv2D(4, 3, groups=(1, 1, 1, 2)[index]), source="do-conv")
        assert np.array_equal(rich[index].D.data().asnumpy(), alone.D.data().asnumpy())
    for name in ("1.gamma", "1.running_var", "2.weight", "4.bias"):
        found = rich._collect_params_with_prefix()[name].data().asnumpy()
        assert np.array_equal(found, values[name].asnumpy()), name
    expected = rich(x)
    difference = abs(fold(rich)(x) - expected).max() / abs(expected).max()
    assert float(difference.asscalar()) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("3.D"), r"missing: 3\.D; superfluous: nothing"),
        (lambda v: v.update({"5.weight": v.pop("4.weight")}), r"missing: 4\.weight; superfluous: 5\.weight"),
        (lambda v: v.update({"3.D": v["0.D"]}), r"3: D: expected \(9, 9, 6\), received \(9, 9, 3\)"),
        (lambda v: v.update({"1.gamma": v["2.bias"]}), r"1\.gamma: expected \(4,\).*received \(6,\)"),
    ],
)
def test_a_network_that_does_not_fit_is_left_alone(change, message):
    net, values, x = original_network()
    rich = expand(net, "doconv")
    rich.initialize()
    rich(x)
    before = {name: p.data().asnumpy() for name, p in rich._collect_params_with_prefix().items()}
    change(values)
    with pytest.raises(CheckpointError, match=message) as caught:
        import_checkpoint(values, rich, "do-conv")
    assert "\n" not in str(caught.value)
    for name, parameter in rich._collect_params_with_prefix().items():
        assert np.array_equal(parameter.data().asnumpy(), before[name]), name


def test_files_and_sources_that_are_others_are_refused(tmp_path):
    net = gluon.nn.Conv2D(2, 3, in_channels=4)
    mx.nd.save(str(tmp_path / "list.params"), [mx.nd.ones(1)])
    with pytest.raises(CheckpointError, match="expected arrays by name, found a list; save by save_parameters"):
        import_checkpoint(tmp_path / "list.params", net, "do-conv")
    with pytest.raises(CheckpointError, match=r"nowhere.params: expected a file of MXNet: .") as caught:
        import_checkpoint(tmp_path / "nowhere.params", net, "do-conv")
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedError, match="unknown checkpoint source 'doconv'; did you mean 'do-conv'"):
        import_checkpoint({}, net, "doconv")
