"""RepVGG layers of Keras: what they fold to, and the norm that is taken in and put back."""

import math

import numpy as np
import pytest
from safetensors.numpy import load_file

import keras
from foldconv.errors import NoMatchError, UnsupportedError
from foldconv.keras import NormPlace, RepVGGConv1D, RepVGGConv2D, RepVGGConv3D, RepVGGDepthwiseConv2D, expand, fold
from foldconv.keras.foldable import add_is_wrong
from foldconv.keras.testing import gradients, in_double
from keras import layers, ops

from .test_goldens import GOLDENS
from .test_orepa import arguments_of

RANDOM = np.random.default_rng(0)


def array(*shape, dtype="float32"):
    return RANDOM.normal(size=shape).astype(dtype)


def near(a, b, tolerance=1e-5):
    np.testing.assert_allclose(ops.convert_to_numpy(a), ops.convert_to_numpy(b), rtol=tolerance, atol=tolerance)


def stir(model):
    """Random weights; variances and gammas between a half and one and a half."""
    for variable in model.weights:
        value = array(*variable.shape, dtype="float64")
        if variable.name in ("gamma", "moving_variance"):
            value = 1 + np.tanh(value) / 2
        variable.assign(0.5 * value if "kernel" in variable.name else value)


CASES = {
    "valid": (RepVGGConv2D, {"kernel_size": 3}, (7, 8), 4, 6),
    "same": (RepVGGConv2D, {"kernel_size": 3, "padding": "same"}, (7, 8), 4, 4),
    "stride 2": (RepVGGConv2D, {"kernel_size": 3, "padding": "same", "strides": 2}, (7, 8), 4, 4),
    "stride 3": (RepVGGConv2D, {"kernel_size": (5, 2), "padding": "same", "strides": 3}, (7, 9), 4, 4),
    "stride 3b": (RepVGGConv2D, {"kernel_size": (5, 2), "padding": "same", "strides": 3}, (8, 10), 4, 4),
    "valid stride": (RepVGGConv2D, {"kernel_size": (3, 4), "strides": 2}, (8, 9), 4, 6),
    "even": (RepVGGConv2D, {"kernel_size": (2, 4), "padding": "same"}, (7, 8), 4, 4),
    "even dilated": (RepVGGConv2D, {"kernel_size": (2, 4), "padding": "same", "dilation_rate": (2, 3)}, (9, 8), 4, 4),
    "valid dilated": (RepVGGConv2D, {"kernel_size": (3, 2), "dilation_rate": 2}, (9, 8), 4, 6),
    "rectangular": (RepVGGConv2D, {"kernel_size": (1, 5), "padding": "same"}, (7, 8), 4, 4),
    "groups": (RepVGGConv2D, {"kernel_size": 3, "padding": "same", "groups": 2}, (7, 8), 4, 4),
    "groups stride": (RepVGGConv2D, {"kernel_size": 3, "padding": "same", "groups": 2, "strides": 2}, (8, 8), 4, 6),
    "no norm": (RepVGGConv2D, {"kernel_size": 3, "padding": "same", "norm": None}, (7, 8), 4, 4),
    "no bias": (RepVGGConv2D, {"kernel_size": 3, "use_bias": False, "activation": "relu"}, (7, 8), 4, 6),
    "1d": (RepVGGConv1D, {"kernel_size": 3, "padding": "same"}, (9,), 4, 4),
    "causal": (RepVGGConv1D, {"kernel_size": 4, "padding": "causal", "dilation_rate": 2}, (9,), 4, 4),
    "causal stride": (RepVGGConv1D, {"kernel_size": 3, "padding": "causal", "strides": 2}, (9,), 4, 4),
    "3d": (RepVGGConv3D, {"kernel_size": (2, 3, 1), "padding": "same"}, (4, 3, 3), 2, 2),
    "depthwise": (RepVGGDepthwiseConv2D, {"kernel_size": 3, "padding": "same"}, (7, 8), 4, 4),
    "depthwise wider": (RepVGGDepthwiseConv2D, {"kernel_size": 3, "strides": 2, "padding": "same"}, (7, 8), 4, 8),
}
ALIGNED = {"same", "rectangular", "groups", "no norm", "1d", "3d", "depthwise"} | {"even"}


def made(name, **more):
    cls, arguments, size, channels, out = CASES[name]
    own = {"depth_multiplier": out // channels} if cls is RepVGGDepthwiseConv2D else {"filters": out}
    layer = cls(**own, **arguments, **more)
    x = array(2, *size, channels, dtype="float64")
    layer.build(x.shape)
    return layer, x


@pytest.mark.parametrize("name", CASES)
def test_the_function_in_evaluation_mode_folds_exactly(name):
    with in_double():
        layer, x = made(name, dtype="float64")
        stir(layer)
        assert (layer.identity_norm is not None) == (name in ALIGNED)
        plain = layer.fold()
        assert type(plain) is layer.plain
        y = layer(x, training=False)
        assert keras.backend.standardize_dtype(y.dtype) == "float64"
        near(plain(x), y, 1e-10)
        # Every branch adds to it.
        for norm in layer.norms:
            norm.gamma.assign(np.zeros(norm.gamma.shape))
            assert np.abs(ops.convert_to_numpy(layer(x, training=False)) - ops.convert_to_numpy(y)).max() > 1e-3
        again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
        assert again.get_config() == layer.get_config()


@pytest.mark.parametrize("name", ["stride 2", "stride 3", "valid stride", "even dilated", "depthwise wider"])
def test_sizes_not_known_when_traced(name):
    layer, x = made(name)
    stir(layer)
    inputs = keras.Input((None,) * (x.ndim - 2) + x.shape[-1:])
    model = keras.Model(inputs, layer(inputs))
    for cut in (0, 1, 2):
        smaller = x[:, cut:, : x.shape[2] - cut].astype("float32")
        near(model.predict(smaller, verbose=0), layer.fold()(smaller), 1e-4)


def test_while_training_the_branches_use_the_batch():
    layer, x = made("same")
    stir(layer)
    x = x.astype("float32")
    y = ops.convert_to_numpy(layer(x, training=True))
    middle = ops.convert_to_numpy(ops.conv(x, layer.point_kernel))
    main = ops.convert_to_numpy(ops.conv(x, layer.kernel, padding="same")) + ops.convert_to_numpy(layer.bias)
    expected = 0
    for norm, branch in zip(layer.norms, (main, middle, x)):
        centred = (branch - branch.mean((0, 1, 2))) / np.sqrt(branch.var((0, 1, 2)) + norm.epsilon)
        expected = expected + centred * ops.convert_to_numpy(norm.gamma) + ops.convert_to_numpy(norm.beta)
    near(y, expected, 1e-4)


@pytest.mark.parametrize("name", ["repvgg_identity", "repvgg_stride2"])
def test_the_authors_block(name):
    path = GOLDENS / f"{name}.safetensors"
    golden, arguments = load_file(path), arguments_of(path)
    stride = arguments.get("stride", 1)
    x = np.moveaxis(golden["input"].astype("float32"), 1, -1)
    norm = layers.BatchNormalization(epsilon=1e-5, momentum=0.9)
    block = RepVGGConv2D(
        arguments["out_channels"], 3, strides=stride, padding="same", use_bias=False, norm=norm, activation="relu"
    )
    if stride > 1:  # Keras' own padding would be another one
        x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        block = RepVGGConv2D(arguments["out_channels"], 3, strides=stride, use_bias=False, norm=norm, activation="relu")
    block.build(x.shape)
    theirs = {"norm": "rbr_dense.bn", "point_norm": "rbr_1x1.bn", "identity_norm": "rbr_identity"}
    fields = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}

    def key(path):
        *parent, last = path.split("/")
        if parent and parent[-1] in theirs:
            return f"{theirs[parent[-1]]}.{fields[last]}"
        return {"kernel": "rbr_dense.conv.weight", "point_kernel": "rbr_1x1.conv.weight"}[last]

    def ours(value):
        return np.moveaxis(value, (1, 0), (-2, -1)) if value.ndim == 4 else value

    for variable in block.weights:
        variable.assign(ours(golden[f"state.{key(variable.path)}"]))
    near(np.moveaxis(ops.convert_to_numpy(block(x, training=False)), -1, 1), golden["output_eval"], 1e-4)
    plain = block.fold()
    near(plain.kernel, ours(golden["kernel"]))
    near(plain.bias, golden["bias"])
    grad, output = gradients(block, x, np.moveaxis(golden["probe"].astype("float32"), 1, -1).copy(), training=True)
    near(np.moveaxis(output, -1, 1), golden["output_train"], 1e-4)
    assert len(grad) == len(block.trainable_variables) == 8 - 2 * (stride > 1)
    for path, value in grad.items():
        wanted = ours(golden[f"grad.{key(path)}"])
        np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=2e-4 * np.abs(wanted).max(), err_msg=path)


def network(dtype="float32"):
    """Norms that can be taken in, and ones that cannot."""

    def conv(filters, size, name, **more):
        return layers.Conv2D(filters, size, padding="same", name=name, dtype=dtype, **more)

    def norm(name, **more):
        return layers.BatchNormalization(name=name, dtype=dtype, **more)

    x = keras.Input((9, 8, 4), dtype=dtype)
    y = norm("bn1", epsilon=1e-2, momentum=0.7)(conv(4, 3, "taken", use_bias=False)(x))
    y = norm("bn2", scale=False)(layers.DepthwiseConv2D(3, strides=2, padding="same", name="taken_too", dtype=dtype)(y))
    y = norm("bn3", center=False)(conv(6, 2, "no_beta", groups=2)(y))
    a = conv(6, 3, "two_readers")(y)
    y = layers.Add(dtype=dtype)([norm("bn4")(a), a])
    y = norm("bn5")(conv(6, 3, "active", activation="tanh")(y))
    y = norm("bn6")(conv(6, 3, "in_evaluation")(y), training=False)
    y = norm("bn7")(conv(6, 3, "no_bias", use_bias=False, activation="relu")(y))
    y = norm("bn8")(conv(6, 1, "one_tap")(y))
    model = keras.Model(x, layers.GlobalAveragePooling2D(dtype=dtype)(y))
    stir(model)
    return model


def test_expanding_a_network_takes_norms_in_and_folding_puts_them_back():
    with in_double():
        model, x = network("float64"), array(2, 9, 8, 4, dtype="float64")
        before, weights = ops.convert_to_numpy(model(x, training=False)), model.get_weights()
        rich = expand(model, "repvgg")
        near(rich(x, training=False), before, 1e-12)
        places = {layer.name for layer in rich.layers if isinstance(layer, NormPlace)}
        assert places == {"bn1", "bn2", "bn3"}
        kinds = {layer.name: layer for layer in rich.layers if hasattr(layer, "norms")}
        assert {name: layer.norm is not None for name, layer in kinds.items()} == {
            **dict.fromkeys(("taken", "taken_too", "no_beta"), True),
            **dict.fromkeys(("two_readers", "active", "in_evaluation"), False),
        }
        first = rich.get_layer("taken")
        assert (first.point_norm.epsilon, first.identity_norm.momentum) == (1e-2, 0.7)
        assert first.norm.epsilon == 1e-2
        stir(rich)
        changed = ops.convert_to_numpy(rich(x, training=False))
        plain = fold(rich)
        assert [(type(a), a.name) for a in plain.layers] == [(type(a), a.name) for a in model.layers]
        near(plain(x, training=False), changed, 1e-10)
        model.set_weights(plain.get_weights())
        near(model(x, training=False), changed, 1e-10)
        assert np.abs(changed - before).max() > 1e-3
        for ours, theirs in zip(plain.get_weights(), weights):
            assert ours.shape == theirs.shape


def test_a_fresh_expansion_folds_to_the_network_itself():
    model = network()
    plain = fold(expand(model, "repvgg", include="taken"))
    x = array(2, 9, 8, 4)
    near(plain(x, training=False), model(x, training=False), 1e-5)
    scale = ops.convert_to_numpy(plain.get_layer("bn1").moving_variance) + 1e-2
    np.testing.assert_allclose(scale, 1, rtol=1e-6)


def test_why_nothing_is_expanded():
    model = keras.Sequential([keras.Input((5, 5, 3)), layers.Conv2D(4, 3, use_bias=False, name="bare")])
    with pytest.raises(NoMatchError, match="replaceable; bare: neither a norm that follows it alone nor a"):
        expand(model, "repvgg")
    model = keras.Sequential([keras.Input((5, 5, 3)), layers.Conv2D(4, 3, name="ice", use_bias=False, trainable=False)])
    model.add(layers.BatchNormalization())
    with pytest.raises(NoMatchError, match="ice: it is frozen, and the norm that follows it is not"):
        expand(model, "repvgg")
    model.layers[1].trainable = False
    rich = expand(model, "repvgg")
    assert not any(norm.trainable for norm in rich.layers[0].norms)
    assert rich.trainable_variables == []
    place = keras.Sequential([keras.Input((5, 5, 3)), NormPlace(layers.BatchNormalization().get_config(), name="lost")])
    with pytest.raises(UnsupportedError, match="lost: it keeps a norm's place, but no RepVGG layer is right before"):
        fold(place)


def test_a_frozen_norm_stays_frozen(tmp_path):
    model = keras.Sequential([keras.Input((5, 5, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(trainable=False)])
    stir(model)
    rich = expand(model, "repvgg")
    rich.save(tmp_path / "model.keras")
    for net in (rich, keras.models.load_model(tmp_path / "model.keras")):
        layer = net.layers[0]
        assert (layer.norm.trainable, layer.point_norm.trainable, layer.trainable) == (False, True, True)
        mean = ops.convert_to_numpy(layer.norm.moving_mean).copy()
        layer(array(2, 5, 5, 3), training=True)
        near(layer.norm.moving_mean, mean, 0)
    assert not fold(rich).layers[1].trainable


def test_mixed_precision():
    policy = "mixed_bfloat16"
    model = keras.Sequential([keras.Input((7, 7, 4)), layers.Conv2D(4, 3, padding="same", dtype=policy)])
    model.add(layers.BatchNormalization(dtype="float32"))
    stir(model)
    rich = expand(model, "repvgg")
    assert {keras.backend.standardize_dtype(w.dtype) for w in rich.weights} == {"float32"}
    assert {norm.dtype_policy.name for norm in rich.layers[0].norms} == {"float32"}
    x = array(2, 7, 7, 4)
    assert keras.backend.standardize_dtype(rich(x).dtype) == "float32"
    near(rich(x, training=False), model(x, training=False), 1e-6)
    assert math.prod(rich.layers[0].point_kernel.shape) == 16


@pytest.mark.skipif(not add_is_wrong(), reason="this backend adds a channels_first bias rightly")
def test_a_shared_layer_is_not_folded_where_one_of_its_calls_is_as_wide_as_its_channels():
    for size, refused in ((8, True), (9, False)):  # outputs are 6 and 4 wide, or 7 and 5
        shared = RepVGGConv2D(4, 3, use_bias=False, data_format="channels_first")
        inputs = keras.Input((4, 5, size))
        small = shared(inputs)
        padded = layers.ZeroPadding2D((1, 0), data_format="channels_first")(small)
        net = keras.Model(inputs, [small, shared(padded)])
        for variable in net.variables:
            variable.assign(np.random.default_rng(0).uniform(0.5, 1, variable.shape))
        if refused:
            with pytest.raises(UnsupportedError, match="expected a width other than 4, received 4"):
                fold(net)
        else:
            assert fold(net).count_params() < net.count_params()


@pytest.mark.parametrize(
    "conv", [keras.layers.Conv2D(4, 3, padding="same"), keras.layers.DepthwiseConv2D(3, padding="same")]
)
def test_a_kernel_that_another_layer_reads_is_refused(conv):
    """The main branch's is not the folded one; what looks at it from outside may."""

    class Reads(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = type(conv).from_config(conv.get_config())

        def call(self, x):
            return self.conv(x) * keras.ops.sum(self.conv.kernel)

    model, x = Reads(), np.ones((1, 5, 5, 4), "float32")
    model(x)
    rich = expand(model, "repvgg")
    assert rich.conv.kernel.shape == model.conv.kernel.shape
    with pytest.raises(UnsupportedError, match=r"the call of Reads reads its kernel: expected one .*; exclude it"):
        rich(x)
