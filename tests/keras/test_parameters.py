"""Which variables decay: seen in a step without gradients."""

import numpy as np
import pytest

import keras
from foldconv.errors import UnsupportedError
from foldconv.keras import exclude_from_weight_decay, expand
from keras import layers, ops


def network():
    """Kernels, biases, a norm of two dimensions, an embedding's matrix."""
    model = keras.Sequential([keras.Input((5, 5, 3)), layers.Conv2D(4, 3, padding="same", name="conv")], name="net")
    for layer in (layers.BatchNormalization(name="bn"), layers.LayerNormalization(axis=[1, 2, 3], name="ln")):
        model.add(layer)
    model.add(layers.Flatten())
    model.add(layers.Dense(2, name="dense"))
    return model


@pytest.mark.parametrize(
    ("method", "decayed"),
    [
        (None, {"conv/kernel"}),
        ("doconv", {"conv/kernel", "conv/D"}),
        ("orepa", {f"conv/{n}" for n in ("kernel", "avg_conv", "prior_conv", "kxk_idconv1", "kxk_conv2", "conv_1x1")}),
        ("repvgg", {"conv/kernel", "conv/point_kernel"}),
    ],
)
def test_only_kernels_and_what_they_are_composed_from_decay(method, decayed):
    model = network() if method is None else expand(network(), method)
    if method == "orepa":
        decayed |= {"conv/gconv_dw", "conv/gconv_pw"}
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    optimizer = keras.optimizers.AdamW(learning_rate=0.1, weight_decay=0.5)
    free = exclude_from_weight_decay(optimizer, model)
    optimizer.build(model.trainable_variables)
    optimizer.apply([ops.zeros(v.shape) for v in model.trainable_variables])
    values = {v.path.removeprefix("net/"): ops.convert_to_numpy(v) for v in model.trainable_variables}
    assert {path for path, value in values.items() if np.allclose(value, 0.95)} == decayed | {"dense/kernel"}
    assert {path for path, value in values.items() if (value == 1).all()} == {
        path.removeprefix("net/") for path in free
    }
    assert len(free) + len(decayed) + 1 == len(values)
    assert {"net/ln/gamma", "net/ln/beta", "net/dense/bias", "net/conv/bias"} <= set(free)


def test_the_optimizer_inside_a_loss_scale():
    model = network()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(weight_decay=0.5))
    exclude_from_weight_decay(optimizer, model)
    assert not optimizer.inner_optimizer._use_weight_decay(model.get_layer("bn").gamma)
    assert optimizer.inner_optimizer._use_weight_decay(model.get_layer("conv").kernel)


def test_too_early_and_too_late():
    model, optimizer = network(), keras.optimizers.AdamW(name="mine")
    optimizer.build(model.trainable_variables)
    with pytest.raises(UnsupportedError, match="mine: it has its variables already; exclude some of them before the"):
        exclude_from_weight_decay(optimizer, model)
    with pytest.raises(UnsupportedError, match="late: it has no weights yet"):
        exclude_from_weight_decay(keras.optimizers.AdamW(), keras.Sequential([layers.Dense(1)], name="late"))


def test_what_is_no_optimizer_or_model_is_refused():
    with pytest.raises(TypeError, match="optimizer: expected an optimizer of Keras, received 'adamw'"):
        exclude_from_weight_decay("adamw", network())
    with pytest.raises(TypeError, match=r"model: expected a keras.Model, received 3"):
        exclude_from_weight_decay(keras.optimizers.AdamW(), 3)
