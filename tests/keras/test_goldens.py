"""The authors' TensorFlow layer and ours: outputs and gradients."""

import json
import pathlib

import numpy as np
import pytest

import keras
from foldconv.errors import CheckpointError
from foldconv.keras import DOConv2D, import_doconv
from keras import ops

GOLDENS = pathlib.Path(__file__).parents[1] / "fixtures" / "goldens"


def gradients(layer, x, probe, **call):
    """Of ``(layer(x) * probe).sum()``, by the path of the weight below the layer's own, and the output."""
    backend = keras.backend.backend()
    variables = layer.trainable_variables
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            y = layer(x, **call)
            loss = ops.sum(y * probe)
        found = tape.gradient(loss, [v.value for v in variables])
    elif backend == "jax":
        import jax

        def loss(values):
            y, _ = layer.stateless_call(values, [v.value for v in layer.non_trainable_variables], x, **call)
            return ops.sum(y * probe), y

        found, y = jax.jit(jax.grad(loss, has_aux=True))([v.value for v in variables])
    else:
        y = layer(x, **call)
        ops.sum(y * ops.convert_to_tensor(probe)).backward()
        found = [v.value.grad for v in variables]
    names = [v.path.removeprefix(f"{layer.name}/") for v in variables]
    return {name: ops.convert_to_numpy(g) for name, g in zip(names, found)}, ops.convert_to_numpy(y)


@pytest.mark.parametrize("name", ["3x3", "depthwise", "dmul12"])
def test_the_authors_layer(name):
    golden = np.load(GOLDENS / f"tf_doconv_{name}.npz")
    arguments = json.loads(str(golden["arguments"]).replace("'", '"').replace("False", "false"))
    layer = DOConv2D(**{"depth_multiplier" if k == "D_mul" else k: v for k, v in arguments.items()})
    layer.build(golden["input"].shape)
    bias = golden["state.bias"] if layer.use_bias else None
    import_doconv(layer, golden["state.kernel"], golden["state.D"], bias)
    grad, output = gradients(layer, golden["input"], golden["probe"])
    np.testing.assert_allclose(output, golden["output"], rtol=1e-4, atol=1e-5)
    taps = [grad["kernel"].reshape(9, *grad["kernel"].shape[2:])]
    taps += [grad["kernel_extra"]] if "kernel_extra" in grad else []
    np.testing.assert_allclose(np.concatenate(taps), golden["grad.kernel"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad["D"].transpose(1, 2, 0), golden["grad.D"], rtol=1e-4, atol=1e-4)
    if bias is not None:
        np.testing.assert_allclose(grad["bias"], golden["grad.bias"], rtol=1e-4, atol=1e-4)


def test_arrays_of_another_layer_are_refused():
    layer = DOConv2D(8, 3, name="target", use_bias=False)
    layer.build((1, 5, 5, 4))
    expected = r"target: D: expected shape \(9, 9, 4\), received \(9, 9, 5\); give the layer the original's arguments"
    with pytest.raises(CheckpointError, match=expected):
        import_doconv(layer, np.zeros((9, 4, 8)), np.zeros((9, 9, 5)))
