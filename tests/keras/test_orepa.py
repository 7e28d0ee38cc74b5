"""OREPA layers of Keras: against torch's with the same parameters, against the authors' code, and how they start."""

import json
import math
import pathlib

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import foldconv
import keras
from foldconv.errors import UnsupportedError
from foldconv.keras import OREPAConv1D, OREPAConv2D, OREPAConv3D, OREPADepthwiseConv2D, expand, orepa
from foldconv.keras.testing import gradients
from keras import ops

from .test_goldens import GOLDENS

RANDOM = np.random.default_rng(0)


def array(*shape):
    return RANDOM.normal(size=shape).astype("float32")


def near(a, b, tolerance=1e-5):
    np.testing.assert_allclose(ops.convert_to_numpy(a), ops.convert_to_numpy(b), rtol=tolerance, atol=tolerance)


def keras_form(tensors, depthwise=False):
    """torch's tensors of one layer, or their gradients, in Keras' layout."""
    values = {}
    for name, tensor in tensors.items():
        value = tensor.detach().numpy()
        if name == "gconv_dw" or (depthwise and name == "weight"):
            # (in · 8, 1, *k), the filters of one channel neighbours; a depthwise weight likewise
            channels = tensors["gconv_dw"].shape[0] // 8
            value = np.moveaxis(value.reshape(channels, -1, *value.shape[2:]), (0, 1), (-2, -1))
        elif value.ndim > 2:
            value = np.moveaxis(value, (1, 0), (-2, -1))
        values["kernel" if name == "weight" else name] = value
    return values


CASES = {
    "3x3": (OREPAConv2D, 4, 6, {"kernel_size": 3}, {}),
    "groups": (OREPAConv2D, 4, 6, {"kernel_size": 3, "groups": 2}, {}),
    "many groups": (OREPAConv2D, 10, 10, {"kernel_size": (2, 3), "groups": 5}, {}),
    "no point": (OREPAConv2D, 4, 6, {"kernel_size": 3, "strides": 2, "use_bias": False}, {"point": False}),
    "1x1 wider": (OREPAConv2D, 4, 6, {"kernel_size": 1}, {}),
    "1x1 narrower": (OREPAConv2D, 6, 4, {"kernel_size": 1}, {}),
    "1d": (OREPAConv1D, 4, 6, {"kernel_size": 3}, {}),
    "3d": (OREPAConv3D, 2, 3, {"kernel_size": (2, 3, 3)}, {}),
    "depthwise": (OREPADepthwiseConv2D, 6, 12, {"kernel_size": 3}, {}),
}
EVERY = pytest.mark.parametrize("name", CASES)


def pair(name, **more):
    """A layer of Keras and torch's, an input of Keras' layout, and torch's tensors."""
    cls, channels, out, arguments, options = CASES[name]
    depthwise = cls is OREPADepthwiseConv2D
    own = {"depth_multiplier": out // channels} if depthwise else {"filters": out}
    layer = cls(**own, **arguments, **options, **more)
    torchs = {"kernel_size": "kernel_size", "strides": "stride", "groups": "groups", "use_bias": "bias"}
    given = {torchs[key]: value for key, value in arguments.items()} | ({"groups": channels} if depthwise else {})
    n = len(layer.kernel_size)
    theirs = getattr(foldconv, f"OREPAConv{n}d")(channels, out, **given, **options)
    for parameter in theirs.parameters():
        parameter.data = torch.from_numpy(0.3 * array(*parameter.shape))
    x = array(2, *(5,) * n, channels)
    layer.build(x.shape)
    values = keras_form(dict(theirs.named_parameters()), depthwise)
    assert sorted(values) == sorted(w.name for w in layer.weights)
    for variable in layer.weights:
        variable.assign(values[variable.name])
    return layer, theirs, x, depthwise


@EVERY
def test_torch_and_keras_agree(name):
    layer, theirs, x, depthwise = pair(name)
    n = x.ndim - 2
    y = theirs(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
    probe = torch.from_numpy(array(*y.shape) / y.shape[1])
    (y * probe).sum().backward()
    grad, output = gradients(layer, x, np.moveaxis(probe.numpy(), 1, -1).copy())
    near(output, np.moveaxis(y.detach().numpy(), 1, -1))
    expected = keras_form({key: p.grad for key, p in theirs.named_parameters()}, depthwise)
    assert grad.keys() == expected.keys()
    for key, value in grad.items():
        assert np.abs(value).max() > 1e-6 or key == "prior_conv"
        near(value, expected[key], 1e-4)
    folded = keras_form({"weight": theirs.fold().weight, "gconv_dw": torch.empty(8 * x.shape[-1])}, depthwise)["kernel"]
    near(layer.kernel, folded)
    plain = layer.fold()
    assert type(plain) is layer.plain
    near(plain.kernel, folded, 1e-6)
    near(plain(x), output, 1e-4)
    assert len(plain.kernel.shape) == n + 2


@EVERY
def test_new_layers_start_as_torchs_do(name):
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    layer, theirs, *_, depthwise = pair(name)
    fresh = type(layer).from_config(layer.get_config())
    fresh.build(layer.get_build_config()["input_shape"])
    theirs.reset_parameters()
    expected = keras_form(dict(theirs.named_parameters()), depthwise)
    for variable in fresh.weights:
        ours, wanted = ops.convert_to_numpy(variable), expected[variable.name]
        if variable.name == "vector" or not wanted.std():
            np.testing.assert_array_equal(ours, wanted * (variable.name != "bias"))
        elif variable.name != "bias":
            # Both uniform on the same interval: no draw lies outside, many reach near its ends.
            bound = math.sqrt(6 / ((1 if layer.point and math.prod(layer.kernel_size) > 1 else 2) * fan(variable)))
            identity = set(np.unique(ours)) <= {0, 1}
            assert identity == (set(np.unique(wanted)) <= {0, 1})
            if not identity:
                assert np.abs(ours).max() <= bound * 1.00001
                assert np.abs(wanted).max() <= bound * 1.00001
                if ours.size >= 100:  # of fewer, chance gives such a deviation too
                    assert min(ours.std(), wanted.std()) > 0.4 * bound
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert again.get_config() == layer.get_config()


def fan(variable):
    """Inputs of one output of a branch."""
    shape = variable.shape
    per_channel = variable.name == "gconv_dw" or (variable.name == "kernel" and "depthwise" in variable.path)
    return math.prod(shape[:-2] if per_channel else shape[:-1])


@pytest.mark.parametrize("name", ["orepa_3x3", "orepa_3x3_stride2_group2", "orepa_1x1"])
def test_the_authors_block(name):
    golden = load_file(GOLDENS / f"{name}.safetensors")
    arguments = arguments_of(GOLDENS / f"{name}.safetensors")
    groups, stride = arguments.get("groups", 1), arguments.get("stride", 1)
    size, padding = arguments.get("kernel_size", 1), arguments.get("padding", 0)
    layer = OREPAConv2D(arguments["out_channels"], size, strides=stride, groups=groups, use_bias=False, name="conv")
    norm = keras.layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name="norm")
    x = np.moveaxis(golden["input"].astype("float32"), 1, -1)
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    block = keras.Sequential([keras.Input(x.shape[1:]), layer, norm], name="block")
    names = {"origin": "kernel", "pfir_conv": "prior_conv", "1x1": "conv_1x1"}
    names |= {f"1x1_{factor}": factor for factor in ("kxk_conv2", "kxk_idconv1")}

    def ours(kind):
        found = {}
        for key, value in golden.items():
            key = key.removeprefix(f"{kind}.")
            short = key.removeprefix("weight_orepa_").removeprefix("weight_or1x1_")
            if f"{kind}.{key}" in golden and short not in ("prior", "avg_avg", "id_tensor"):
                found[names.get(short, short)] = torch.from_numpy(value)
        if "gconv_pw" in found:  # the original has the group as the inner index of its rows
            rows = found["gconv_pw"].reshape(-1, groups, *found["gconv_pw"].shape[1:])
            found["gconv_pw"] = rows.transpose(0, 1).reshape(found["gconv_pw"].shape)
        return keras_form(found)

    state = ours("state")
    for variable in layer.weights:
        variable.assign(state[variable.name])
    for variable, key in zip(norm.weights, ("weight", "bias", "running_mean", "running_var")):
        variable.assign(state[f"bn.{key}"])
    near(np.moveaxis(ops.convert_to_numpy(block(x, training=False)), -1, 1), golden["output_eval"], 1e-4)
    scale = golden["state.bn.weight"] / np.sqrt(golden["state.bn.running_var"] + 1e-5)
    near(layer.fold().kernel * scale, np.moveaxis(golden["kernel"], (1, 0), (-2, -1)), 1e-5)
    grad, output = gradients(block, x, np.moveaxis(golden["probe"].astype("float32"), 1, -1).copy(), training=True)
    near(np.moveaxis(output, -1, 1), golden["output_train"], 1e-4)
    expected = ours("grad")
    assert len(grad) == len(layer.weights) + 2
    for key, value in grad.items():
        wanted = expected[{"gamma": "bn.weight", "beta": "bn.bias"}.get(key.split("/")[-1], key.split("/")[-1])]
        np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max(), err_msg=key)


def arguments_of(path):
    """The arguments among a golden's metadata."""
    raw = pathlib.Path(path).read_bytes()
    return json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["arguments"])


def test_expanding_keeps_the_kernel_bit_for_bit():
    keras.utils.set_random_seed(0)
    x = array(2, 9, 9, 6)
    model = keras.Sequential([keras.Input((9, 9, 6)), keras.layers.Conv2D(8, 3, groups=2, activation="relu")])
    model.add(keras.layers.DepthwiseConv2D(3))
    model.add(keras.layers.Conv2D(5, 1, kernel_initializer="ones"))
    rich = expand(model, "orepa")
    for ours, theirs in zip(rich.layers, model.layers):
        np.testing.assert_array_equal(ops.convert_to_numpy(ours.kernel), ops.convert_to_numpy(theirs.kernel))
        np.testing.assert_array_equal(ops.convert_to_numpy(ours.vector)[1:], 0)
        np.testing.assert_array_equal(ops.convert_to_numpy(ours.fold().kernel), ops.convert_to_numpy(theirs.kernel))
        # the new branches are drawn, so that their scales learn from the first step
        assert np.abs(ops.convert_to_numpy(next(iter(ours.present().values())))).max() > 0
    near(rich(x), model(x), 1e-7)
    assert rich.layers[0].point
    assert not expand(model, "orepa", point=False).layers[0].point
    with pytest.raises(UnsupportedError, match="method 'orepa': unknown option 'points'; did you mean 'point'"):
        expand(model, "orepa", points=False)


def test_one_tap_with_groups_is_refused():
    defined = "OREPA_1x1 is defined for one group; use"
    with pytest.raises(UnsupportedError, match=f"pw: its kernel has one tap and 2 groups; {defined} Conv2D"):
        OREPAConv2D(4, 1, groups=2, name="pw")
    with pytest.raises(UnsupportedError, match=f"dw: its kernel has one tap and a group per channel; {defined} Depth"):
        OREPADepthwiseConv2D(1, name="dw")


@pytest.mark.parametrize(("out", "size"), [(6, (3, 3)), (7, (2, 5)), (4, (3,)), (9, (1, 3, 2))])
def test_the_cosines_are_torchs(out, size):
    from foldconv.methods._orepa_branches import Branches

    theirs = Branches(2, out, size, 1).prior(torch.zeros((), dtype=torch.float64)).numpy()
    np.testing.assert_array_equal(orepa._cosines(out, size, 1)[0, 0].T, theirs)
