"""Weights of the original Gluon layer: its function and gradients, as it computed them itself."""

import ast
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

from foldconv.errors import CheckpointError
from foldconv.gluon import DOConv2D, load_original

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
    load_original(layer, state)
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
    layer = DOConv2D(out, 3, groups=groups, use_bias=False)
    load_original(layer, {"weight": weight, "D": D})
    assert np.allclose(layer.fold().weight.data().asnumpy(), kernel, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("D"), r"expected the arrays \['D', 'bias', 'weight'\], received \['bias', 'weight'\]"),
        (lambda v: v.update(D=np.zeros((4, 9, 9))), r"D: expected \(9, 9, 4\), received \(4, 9, 9\)"),
        (lambda v: v.update(weight=np.zeros((2, 3, 3, 3))), "weight|D"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    layer = DOConv2D(2, 3, in_channels=4)
    layer.initialize()
    before = layer.weight.data().asnumpy()
    values = {"weight": np.ones((2, 4, 3, 3)), "D": np.zeros((9, 9, 4)), "bias": np.zeros(2)}
    change(values)
    with pytest.raises(CheckpointError, match=message):
        load_original(layer, values)
    assert np.array_equal(layer.weight.data().asnumpy(), before)
