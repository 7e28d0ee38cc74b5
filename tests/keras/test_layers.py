"""What is DO-Conv's own among its layers of Keras; the rest is the battery's (test_conformance.py)."""

import math

import numpy as np
import pytest

import keras
from foldconv.errors import UnsupportedError
from foldconv.keras import DOConv1D, DOConv2D, DOConv3D, DODepthwiseConv1D, DODepthwiseConv2D, expand
from keras import ops

RANDOM = np.random.default_rng(0)


def array(*shape):
    return RANDOM.normal(size=shape).astype("float32")


def stir(layer):
    """Give every weight a random value, D too, so that composing shows."""
    layer.set_weights([0.3 * array(*w.shape) for w in layer.weights])
    return layer


def expected_kernel(layer):
    """The definition in loops over the channels: K[m, i, o] = W[m, i, o] + Σ_s D[c, m, s] W[s, i, o]."""
    named = {w.name: ops.convert_to_numpy(w).astype("float64") for w in layer.weights}
    *size, channels, out = named["kernel"].shape
    taps = math.prod(size)
    W = named["kernel"].reshape(taps, channels, out)
    if "kernel_extra" in named:
        W = np.concatenate([W, named["kernel_extra"]])
    K = W[:taps].copy()
    groups = getattr(layer, "groups", 1)
    for o in range(out):
        group = o // (out // groups)
        for i in range(channels):
            K[:, i, o] += named["D"][group * channels + i] @ W[:, i, o]
    return K.reshape(*size, channels, out)


LAYERS = {
    "1d": (DOConv1D, {"filters": 6, "kernel_size": 3}, (9, 4)),
    "1d causal": (DOConv1D, {"filters": 6, "kernel_size": 3, "padding": "causal", "dilation_rate": 2}, (9, 4)),
    "2d": (DOConv2D, {"filters": 6, "kernel_size": 3, "padding": "same"}, (7, 7, 4)),
    "2d oblong": (DOConv2D, {"filters": 6, "kernel_size": (1, 3), "strides": 2, "use_bias": False}, (7, 7, 4)),
    "2d groups": (DOConv2D, {"filters": 6, "kernel_size": 3, "groups": 2, "activation": "relu"}, (7, 7, 4)),
    "2d surplus": (DOConv2D, {"filters": 6, "kernel_size": 3, "groups": 2, "depth_multiplier": 12}, (7, 7, 4)),
    "3d": (DOConv3D, {"filters": 3, "kernel_size": 2, "depth_multiplier": 9}, (4, 4, 4, 2)),
    "depthwise 1d": (DODepthwiseConv1D, {"kernel_size": 3, "D_mul": 5}, (9, 4)),
    "depthwise 2d": (DODepthwiseConv2D, {"kernel_size": 3, "padding": "same"}, (7, 7, 4)),
    "depthwise 2d surplus": (DODepthwiseConv2D, {"kernel_size": 3, "depth_multiplier": 2, "D_mul": 11}, (7, 7, 4)),
}
EVERY = pytest.mark.parametrize("name", LAYERS)


def made(name, **more):
    cls, arguments, shape = LAYERS[name]
    layer = cls(**arguments, **more)
    x = array(2, *shape)
    layer(x)
    return layer, x


def near(a, b, tolerance=1e-5):
    np.testing.assert_allclose(ops.convert_to_numpy(a), ops.convert_to_numpy(b), rtol=tolerance, atol=tolerance)


@EVERY
def test_the_kernel_is_composed_as_defined_and_folds(name):
    layer, x = made(name)
    stir(layer)
    near(layer.kernel, expected_kernel(layer))
    plain = layer.fold()
    assert type(plain) is layer.plain
    assert plain.name == layer.name
    near(plain.kernel, expected_kernel(layer), 1e-6)
    near(layer(x), plain(x))


def test_one_tap_has_no_D():
    layer = DOConv2D(3, 1)
    layer.build((1, 4, 4, 2))
    assert [w.name for w in layer.weights] == ["kernel", "bias"]
    assert layer.D is None
    near(layer.fold().kernel, layer.kernel, 0)


@pytest.mark.parametrize("given", [8, 9.0, True, "9"])
def test_fewer_taps_than_the_kernel_are_refused(given):
    with pytest.raises(UnsupportedError, match=f"depth_multiplier: expected an integer ≥ 9.*received {given!r}"):
        DOConv2D(3, 3, depth_multiplier=given)
    with pytest.raises(UnsupportedError, match=f"D_mul: expected an integer ≥ 9.*received {given!r}"):
        DODepthwiseConv2D(3, D_mul=given)


def test_lora_is_part_of_what_is_composed():
    layer, x = made("2d")
    stir(layer)
    before = ops.convert_to_numpy(layer(x))
    layer.enable_lora(2)
    near(layer(x), before)
    names = [w.name for w in layer.trainable_weights]
    assert "kernel" not in names
    assert {"D", "lora_kernel_a", "lora_kernel_b"} <= set(names)
    layer.lora_kernel_b.assign(0.3 * array(*layer.lora_kernel_b.shape))
    assert np.abs(ops.convert_to_numpy(layer(x)) - before).max() > 0.1
    near(layer.fold()(x), layer(x))
    again = DOConv2D.from_config(layer.get_config())
    again.build(x.shape)
    assert again.lora_enabled
    assert again.D is not None


def test_saving_with_lora_merges_it(tmp_path):
    model = keras.Sequential([keras.Input((7, 7, 4)), DOConv2D(6, 3)])
    stir(model.layers[0])
    model.layers[0].enable_lora(2)
    model.layers[0].lora_kernel_b.assign(0.3 * array(2, 6))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = array(2, 7, 7, 4)
    near(again(x), model(x))


def test_lora_learns_after_weights_are_loaded(tmp_path):
    model = keras.Sequential([keras.Input((6, 6, 3)), DOConv2D(4, 3, name="conv")])
    model.save_weights(tmp_path / "w.weights.h5")
    model.layers[0].enable_lora(2)
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype("float32")
    before = model.predict(x, verbose=0)
    model.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_allclose(model.predict(x, verbose=0), before, rtol=1e-5, atol=1e-6)
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(x, np.ones_like(before), verbose=0)
    assert np.abs(keras.ops.convert_to_numpy(model.layers[0].lora_kernel_b)).max() > 0


def test_spectral_normalization_is_refused_in_one_line():
    with pytest.raises(
        UnsupportedError, match=r"^conv: SpectralNormalization writes to a kernel, .* wrap a Conv2D, or"
    ):
        keras.layers.SpectralNormalization(DOConv2D(4, 3, name="conv")).build((None, 6, 6, 3))
    around = keras.layers.SpectralNormalization(keras.layers.Conv2D(4, 3, name="inside"), name="around")
    model = keras.Sequential([keras.Input((6, 6, 3)), around, keras.layers.Conv2D(4, 3, name="free")])
    rich = expand(model)
    assert [type(layer).__name__ for layer in (rich.layers[0].layer, rich.layers[1])] == ["Conv2D", "DOConv2D"]
    with pytest.raises(UnsupportedError, match=r"inside: .* the SpectralNormalization around it writes to its kernel"):
        expand(model, include="inside")
