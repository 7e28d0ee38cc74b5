"""The parameters of tests/fixtures/parity.npz in Keras, on the backend that KERAS_BACKEND names.

tests/parity holds the same against PyTorch, tests/gluon against Gluon; the expected values are NumPy's.
"""

import numpy as np
import pytest

import keras
from foldconv.keras import DOConv2D, DODepthwiseConv2D
from keras import ops

from ..parity import write_parity

BACKEND = keras.backend.backend()
CASES = [(case, depthwise) for case in write_parity.CASES for depthwise in {False, case.startswith("depthwise")}]
PRECISIONS = [("float32", 3e-5)]
if BACKEND == "tensorflow":  # elsewhere Keras' own rules make float32 of a product of two float64
    PRECISIONS += [("float64", 1e-10)]


def made(settings, depthwise, dtype):
    """The layer of a case; the padding is the test's own, as Keras has none by numbers."""
    arguments = {"strides": settings["stride"], "dilation_rate": settings["dilation"], "use_bias": settings["bias"]}
    arguments["dtype"] = dtype
    if depthwise:
        multiplier = settings["out"] // settings["channels"]
        return DODepthwiseConv2D(
            settings["kernel"], depth_multiplier=multiplier, D_mul=settings["multiplier"], **arguments
        )
    arguments |= {"groups": settings["groups"], "depth_multiplier": settings["multiplier"]}
    return DOConv2D(settings["out"], settings["kernel"], **arguments)


def keras_form(name, value, depthwise):
    """A parameter's name and value in Keras from those in torch."""
    if name == "weight":
        if depthwise:
            return "kernel", value.reshape(4, -1, *value.shape[2:]).transpose(2, 3, 0, 1)
        return "kernel", value.transpose(2, 3, 1, 0)
    if name == "weight_extra":
        return "kernel_extra", value.reshape(4, -1, value.shape[2]).transpose(2, 0, 1) if depthwise else value.T
    return name, value


def gradients(layer, x, padding, probe):
    """Output, and the gradients of ``(output * probe).sum()`` by the input and each variable."""
    variables = layer.trainable_variables
    pad = [(0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(ops.pad(x, pad))
            loss = ops.sum(y * probe)
        found = tape.gradient(loss, [x, *(v.value for v in variables)])
    elif BACKEND == "jax":
        import jax

        def loss(values):
            y, _ = layer.stateless_call(values[1:], [], ops.pad(values[0], pad))
            return ops.sum(y * probe), y

        found, y = jax.grad(loss, has_aux=True)([jax.numpy.asarray(x), *(v.value for v in variables)])
    else:
        import torch

        x = torch.tensor(x, requires_grad=True)
        y = layer(ops.pad(x, pad))
        ops.sum(y * ops.convert_to_tensor(probe)).backward()
        found = [x.grad, *(v.value.grad for v in variables)]
    names = ["input", *(v.name for v in variables)]
    return ops.convert_to_numpy(y), {name: ops.convert_to_numpy(value) for name, value in zip(names, found)}


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(("case", "depthwise"), CASES)
def test_keras(case, depthwise, dtype, tolerance):
    values, settings = write_parity.read(case)
    last = {name: values[name].transpose(0, 2, 3, 1) for name in ("input", "probe", "output", "grad.input")}
    state = {n.removeprefix("state."): v for n, v in values.items() if n.startswith("state.")}
    state = dict(keras_form(name, value, depthwise) for name, value in state.items())

    def near(received, wanted, factor=1):
        received = ops.convert_to_numpy(received)
        np.testing.assert_allclose(received, wanted, rtol=tolerance * factor, atol=tolerance * factor)

    layer = made(settings, depthwise, dtype)
    layer.build((None, None, None, settings["channels"]))
    assert {v.name for v in layer.weights} == set(state)
    for variable in layer.weights:
        variable.assign(state[variable.name])
    y, found = gradients(layer, last["input"].astype(dtype), settings["padding"], last["probe"].astype(dtype))
    assert y.dtype == dtype
    near(y, last["output"])
    kernel = keras_form("weight", values["kernel"], depthwise)[1]
    near(layer.kernel, kernel)
    near(layer.fold().kernel, kernel)
    near(found.pop("input"), last["grad.input"])
    expected = {n.removeprefix("grad."): v for n, v in values.items() if n.startswith("grad.") and "input" not in n}
    expected = dict(keras_form(name, value, depthwise) for name, value in expected.items())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        near(gradient, expected[name], 10)
