"""expand and fold on whole models."""

import math

import numpy as np
import pytest

import keras
from foldconv.errors import NoMatchError, UnsupportedError
from foldconv.keras import DODepthwiseConv2D, FoldableLayer, RepVGGConv2D, expand, fold

JIT = keras.backend.backend() == "jax"


def rich_layers(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, FoldableLayer)]


def near(a, b, tolerance=1e-4):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def stir(model):
    """Let every new branch add something."""
    random = np.random.default_rng(1)
    for layer in rich_layers(model):
        if layer.method == "doconv":
            layer.D.assign(0.1 * random.normal(size=layer.D.shape))
        elif layer.method == "orepa":
            scales = 0.1 * random.normal(size=layer.vector.shape)
            scales[0] = 1
            layer.vector.assign(scales)
        else:
            for norm in layer.norms[-2:]:
                norm.gamma.assign(1 + 0.1 * random.normal(size=norm.gamma.shape))


def check(model, x, method="doconv"):
    """Expanding keeps the function; after a change of the branches, folding does, and its weights fit the original."""

    def output(net):  # JAX would compile each operation alone; TensorFlow takes longer to trace than to compute
        return net.predict(x, verbose=0) if JIT else keras.ops.convert_to_numpy(net(x))

    before = output(model)
    rich = expand(model, method)
    assert rich_layers(rich)
    assert not rich_layers(model)
    near(output(rich), before)
    stir(rich)
    changed = output(rich)
    assert np.abs(changed - before).max() > 1e-3 * np.abs(before).max()
    plain = fold(rich)
    assert not rich_layers(plain)
    assert [type(layer) for layer in plain._flatten_layers()] == [type(layer) for layer in model._flatten_layers()]
    near(output(plain), changed, 1e-3)
    model.set_weights(plain.get_weights())
    near(output(model), changed, 1e-3)
    return rich


NETWORKS = {
    "ResNet50": ("doconv", "repvgg"),
    "MobileNetV2": ("doconv", "orepa", "repvgg"),
    "MobileNetV3Small": ("doconv",),
    "EfficientNetB0": ("doconv",),
}


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in NETWORKS for method in NETWORKS[name]])
def test_networks(name, method):
    keras.utils.set_random_seed(3)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(32, 32, 3), classes=5, classifier_activation=None
    )
    rich = check(model, np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32"), method)
    convolutions = sum(isinstance(layer, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)) for layer in model.layers)
    more_than_one_tap = sum(math.prod(getattr(layer, "kernel_size", (1,))) > 1 for layer in model.layers)
    assert len(rich_layers(rich)) == (convolutions if method == "orepa" else more_than_one_tap)


def nested():
    inner = keras.Sequential([keras.Input((8, 8, 4)), keras.layers.Conv2D(4, 3, padding="same", name="inner_conv")])
    x = keras.Input((8, 8, 3))
    y = keras.layers.Conv2D(4, 3, padding="same", name="first")(x)
    y = inner(inner(y)) + y
    y = keras.layers.BatchNormalization()(keras.layers.DepthwiseConv2D(3, name="per_channel")(y))
    return keras.Model(x, keras.layers.Conv2D(2, 1, name="last")(y))


def test_nested_and_shared():
    rich = check(nested(), np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32"))
    assert sorted(layer.name for layer in rich_layers(rich)) == ["first", "inner_conv", "per_channel"]


def test_training_leaves_the_model_that_was_copied_alone():
    # JAX gives a step's buffers away: what is shared would be deleted under the other model.
    x, y = np.ones((2, 8, 8, 3), "float32"), np.zeros((2, 6, 6, 2), "float32")
    model = nested()
    before, rich = model.get_weights(), expand(model)
    rich.compile("sgd", "mse", jit_compile=JIT)
    rich.fit(x, y, verbose=0)
    plain = fold(rich)
    trained = rich.get_weights()
    plain.compile("sgd", "mse", jit_compile=JIT)
    plain.fit(x, y, verbose=0)
    for left, kept in ((model, before), (rich, trained)):
        assert all(np.array_equal(a, b) for a, b in zip(left.get_weights(), kept, strict=True))


def test_patterns():
    model = nested()
    assert [layer.name for layer in rich_layers(expand(model, include="f*"))] == ["first"]
    assert len(rich_layers(expand(model, exclude=["first", "per*"]))) == 1
    assert isinstance(expand(model, depth_multiplier=12).get_layer("per_channel"), DODepthwiseConv2D)
    with pytest.raises(NoMatchError, match=r"'frist' matches no convolution of .*; did you mean 'first'"):
        expand(model, include="frist")
    with pytest.raises(
        NoMatchError, match=r"nothing to expand .*1 convolutions selected, .*; last: its kernel has one"
    ):
        expand(model, include="la*")
    with pytest.raises(NoMatchError, match="none of its 4 convolutions is selected by include and exclude"):
        expand(model, exclude="*")
    with pytest.raises(UnsupportedError, match=r"unknown method 'docnv'; did you mean 'doconv'"):
        expand(model, "docnv")


class Scaled(keras.layers.Conv2D):
    """A convolution of a user's own."""

    def call(self, inputs):
        return 2 * super().call(inputs)


class Three(keras.layers.Conv2D):
    """One with only a constructor of its own."""

    def __init__(self, filters, extra=None, **kwargs):
        super().__init__(filters, 3, padding="same", **{key: kwargs[key] for key in ("name",) if key in kwargs})
        self.extra = None if extra is None else keras.layers.Dense(extra)

    def get_config(self):
        return {"filters": self.filters, "name": self.name}


class Again(Three):
    """And a subclass of that."""


def test_subclasses_with_only_a_constructor_are_convolutions():
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype("float32")
    for method in ("doconv", "repvgg"):
        norm = keras.layers.BatchNormalization(name="norm")
        model = keras.Sequential([keras.Input((6, 6, 3)), Three(3, name="a"), norm, Again(2, name="b")])
        before = model.predict(x, verbose=0)
        rich = expand(model, method)
        assert [layer.name for layer in rich_layers(rich)] == ["a", "b"]
        stir(rich)
        changed = rich.predict(x, verbose=0)
        assert np.abs(changed - before).max() > 1e-3
        plain = fold(rich)
        near(plain.predict(x, verbose=0), changed)
        assert type(plain.layers[0]) is keras.layers.Conv2D
        model.set_weights(plain.get_weights())
        near(model.predict(x, verbose=0), changed)
    with pytest.raises(UnsupportedError, match=r"^a: .*Three is a subclass with more than a constructor"):
        expand(keras.Sequential([keras.Input((6, 6, 3)), Three(3, extra=2, name="a")]), include="a")


def test_a_layer_that_is_spelled_out_and_cannot_be_replaced_is_refused():
    model = nested()
    x = keras.Input((8, 8, 3))
    y = keras.layers.SeparableConv2D(4, 3, name="apart")(keras.layers.Conv2DTranspose(4, 3, name="up")(x))
    model = keras.Model(x, model(Scaled(3, 3, padding="same", name="own")(y)))
    for include, reason in {
        "last": "Conv2D cannot become doconv: its kernel has one tap",
        "own": r"Scaled cannot become doconv: .*Scaled is a subclass with more than a constructor of its own",
        "up": "Conv2DTranspose cannot become doconv: doconv has no layer for it; expected one of Conv1D, Conv2D",
        "apart": "SeparableConv2D cannot become doconv: doconv has no layer for it",
    }.items():
        with pytest.raises(UnsupportedError, match=f"^{include}: {reason}"):
            expand(model, include=["first", include])
    rich = expand(model, include=["first", "*a*"])  # a glob asks for nothing in particular
    assert {layer.name for layer in rich_layers(rich)} == {"first", "per_channel"}
    with pytest.raises(NoMatchError, match="first: it is foldable already"):
        expand(rich, include="first")


def test_what_cannot_be_expanded_says_so():
    with pytest.raises(UnsupportedError, match="it has no weights yet"):
        expand(keras.Sequential([keras.layers.Conv2D(2, 3)]))
    with pytest.raises(UnsupportedError, match=r"expected a keras\.Model, received Conv2D"):
        expand(keras.layers.Conv2D(2, 3))


def graph_of(cls):
    x = keras.Input((6, 6, 3))
    return cls(x, keras.layers.Conv2D(4, 3)(x))


def test_a_graph_of_a_users_class_keeps_it_or_is_refused():
    """Keras clones some as its own class, which would train another loss or compute another function."""

    class Trains(keras.Model):
        def train_step(self, *args, **kwargs):
            return super().train_step(*args, **kwargs)

    assert isinstance(expand(graph_of(Trains)), Trains)

    class Sized(Trains):
        def __init__(self, size, **kwargs):
            x = keras.Input((size, size, 3))
            super().__init__(x, keras.layers.Conv2D(4, 3)(x), **kwargs)

    with pytest.raises(
        UnsupportedError, match=r"own: a copy .* Functional without the train_step of its class Sized: exp"
    ):
        expand(Sized(6, name="own"))

    class Twice(keras.Sequential):
        def call(self, *args, **kwargs):
            return 2 * super().call(*args, **kwargs)

    twice = Twice([keras.Input((6, 6, 3)), keras.layers.Conv2D(4, 3)])
    with pytest.raises(UnsupportedError, match=r"Sequential without the call of its class Twice"):
        expand(keras.Sequential([keras.Input((6, 6, 3)), twice]))

    class Named(keras.Sequential):
        def __init__(self):
            super().__init__([keras.Input((6, 6, 3)), keras.layers.Conv2D(4, 3)])

    assert rich_layers(expand(Named()))


def test_options_out_of_range_are_one_line():
    model = keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Conv2D(4, 3, name="first")])
    with pytest.raises(UnsupportedError, match=r"^first: depth_multiplier: expected an integer ≥ 9, .* received 4;"):
        expand(model, depth_multiplier=4)
    with pytest.raises(TypeError, match="point: expected True or False, received 'no'"):
        expand(model, "orepa", point="no")
    with pytest.raises(
        TypeError, match="norm: expected True, a BatchNormalization, its config, or None, received 'bat"
    ):
        RepVGGConv2D(4, 3, norm="batch")
