"""DO-Conv layers of Keras, on the backend that KERAS_BACKEND names."""

import math

import numpy as np
import pytest

import keras
from foldconv.errors import UnsupportedError
from foldconv.keras import DOConv1D, DOConv2D, DOConv3D, DODepthwiseConv1D, DODepthwiseConv2D
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
def test_a_new_layer_is_the_plain_one_with_the_same_kernel(name):
    layer, x = made(name)
    arguments = {k: v for k, v in LAYERS[name][1].items() if k not in ("D_mul", *layer.options)}
    if "depthwise" in name and "depth_multiplier" in LAYERS[name][1]:
        arguments["depth_multiplier"] = LAYERS[name][1]["depth_multiplier"]
    plain = layer.plain(**arguments)
    plain(x)
    shapes = [w.shape for w in plain.weights]
    assert [w.shape for w in layer.weights][: len(shapes)] == shapes
    assert [w.name for w in layer.weights][: len(shapes)] == [w.name for w in plain.weights]
    plain.set_weights(layer.get_weights()[: len(shapes)])
    near(layer(x), plain(x))
    assert layer.compute_output_shape(x.shape) == tuple(plain(x).shape)


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


@EVERY
def test_config_rebuilds_the_layer(name):
    layer, x = made(name)
    stir(layer)
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
    again.set_weights(layer.get_weights())
    near(layer(x), again(x), 1e-7)


@pytest.mark.parametrize("name", ["2d", "2d groups", "depthwise 2d"])
def test_channels_first(name):
    last, x = made(name)
    layer = LAYERS[name][0](**LAYERS[name][1], data_format="channels_first")
    if keras.backend.backend() == "tensorflow":
        # TensorFlow's CPU kernels take channels_last only; the kernel is made all the same.
        layer.build((2, 4, 7, 7))
        stir(last)
        layer.set_weights(last.get_weights())
        near(layer.kernel, last.kernel, 1e-7)
        plain = layer.fold()
        assert plain.data_format == "channels_first"
        near(plain.kernel, last.kernel, 1e-6)
        return
    turned = np.moveaxis(x, -1, 1)
    layer(turned)
    stir(last)
    layer.set_weights(last.get_weights())
    near(np.moveaxis(ops.convert_to_numpy(layer(turned)), 1, -1), last(x))
    near(layer.fold()(turned), layer(turned))


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


def test_folding_needs_weights():
    with pytest.raises(UnsupportedError, match="conv_without: it has no weights yet; call it, or build it"):
        DOConv2D(3, 3, name="conv_without").fold()


def test_regularizer_and_constraint_act_on_the_kernel_variable():
    layer = DOConv2D(3, 3, kernel_regularizer="l2", kernel_constraint="non_neg")
    layer.build((1, 5, 5, 2))
    stir(layer)
    kernel, _, D = layer.weights
    near(layer.losses[0], 0.01 * np.sum(ops.convert_to_numpy(kernel) ** 2))
    assert len(layer.losses) == 1
    assert kernel.constraint is not None
    assert D.constraint is None


def test_mixed_precision_composes_in_float32():
    layer, x = made("2d surplus", dtype="mixed_bfloat16")
    stir(layer)
    assert {keras.backend.standardize_dtype(w.dtype) for w in layer.weights} == {"float32"}
    # Seen where it is composed: the autocast that Keras puts around `call` must not have reached the factors.
    seen = []
    compose = layer.compose
    layer.compose = lambda kernel: seen.append(compose(kernel)) or seen[-1]
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    want = ops.cast(ops.convert_to_tensor(expected_kernel(layer).astype("float32")), "bfloat16")
    difference = ops.abs(ops.cast(seen[0], "float32") - ops.cast(want, "float32"))
    # Rounded once: a few entries lie at the border of two bfloat16 numbers, none is a whole step off.
    assert float(ops.mean(ops.cast(difference > 0, "float32"))) < 0.02


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


@pytest.mark.parametrize("name", ["1d causal", "2d surplus", "depthwise 2d surplus"])
def test_a_network_trains_saves_and_loads_with_its_optimizer(name, tmp_path):
    cls, arguments, shape = LAYERS[name]
    keras.utils.set_random_seed(1)
    compiles = keras.backend.backend() != "torch"
    model = keras.Sequential([keras.Input(shape), cls(**arguments, name="rich"), keras.layers.Flatten()])
    model.add(keras.layers.Dense(1))
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=compiles)
    x, y = array(16, *shape), array(16, 1)
    start = model.evaluate(x, y, verbose=0)
    model.fit(x, y, batch_size=8, epochs=4, verbose=0)
    assert model.evaluate(x, y, verbose=0) < start
    assert np.abs(ops.convert_to_numpy(model.get_layer("rich").D)).max() > 0
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.get_layer("rich")) is cls
    near(again.predict(x, verbose=0), model.predict(x, verbose=0), 1e-6)
    assert int(ops.convert_to_numpy(again.optimizer.iterations)) == 8
    for ours, theirs in zip(again.optimizer.variables, model.optimizer.variables):
        near(ours, theirs, 0)
    again.fit(x, y, batch_size=8, epochs=1, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    again.load_weights(tmp_path / "model.weights.h5")
    near(again.predict(x, verbose=0), model.predict(x, verbose=0), 1e-6)


def test_saving_with_lora_merges_it(tmp_path):
    model = keras.Sequential([keras.Input((7, 7, 4)), DOConv2D(6, 3)])
    stir(model.layers[0])
    model.layers[0].enable_lora(2)
    model.layers[0].lora_kernel_b.assign(0.3 * array(2, 6))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = array(2, 7, 7, 4)
    near(again(x), model(x))
