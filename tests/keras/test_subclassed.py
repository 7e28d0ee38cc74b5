"""expand and fold on subclassed models, and on layers that hold layers."""

import functools
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import keras
from foldconv.errors import UnsupportedError
from foldconv.keras import DOConv2D, FoldableLayer, expand, fold
from keras import layers, ops

RANDOM = np.random.default_rng(0)
registered = keras.saving.register_keras_serializable(package="tests")


def array(*shape):
    return RANDOM.normal(size=shape).astype("float32")


def near(a, b, tolerance=1e-5):
    np.testing.assert_allclose(ops.convert_to_numpy(a), ops.convert_to_numpy(b), rtol=tolerance, atol=tolerance)


def rich_layers(model):
    return {layer.name for layer in model._flatten_layers() if isinstance(layer, FoldableLayer)}


def stir(model):
    for layer in model._flatten_layers():
        if isinstance(layer, DOConv2D):
            layer.D.assign(0.3 * array(*layer.D.shape))


@registered
class Block(layers.Layer):
    """A layer that holds layers, with a variable and an option of its own."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.conv = layers.Conv2D(width, 3, padding="same", name="in_block")
        self.norm = layers.BatchNormalization()

    def build(self, shape):
        self.conv.build(shape)
        self.norm.build((*shape[:-1], self.width))
        self.gate = self.add_weight(name="gate", shape=(self.width,), initializer="ones")

    def call(self, x, training=None):
        return self.gate * self.norm(self.conv(x), training=training)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@registered
class Net(keras.Model):
    """Layers in attributes, a list, a dict, nested models of each kind, and one that is shared."""

    def __init__(self, width=4, **kwargs):
        super().__init__(**kwargs)
        self.stem = layers.Conv2D(width, 3, padding="same", name="stem")
        self.blocks = [Block(width, name="a"), Block(width, name="b")]
        self.heads = {
            "left": layers.Conv2D(width, (1, 3), padding="same", name="left"),
            "right": layers.Conv2D(width, 1),
        }
        self.tower = keras.Sequential([layers.Conv2D(width, 3, padding="same", name="in_tower"), layers.ReLU()])
        x = keras.Input((None, None, width), name="graph_input")
        self.graph = keras.Model(
            x, layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", name="in_graph")(x))
        )
        self.again = self.stem_of_graph = self.graph
        self.drop = layers.Dropout(0.5, seed=1)
        self.tracker = keras.metrics.Mean(name="tracked")
        self.head = layers.Dense(1, name="head")

    def call(self, x, training=None):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, training=training)
        x = self.heads["left"](x) + self.heads["right"](x)
        x = self.again(self.graph(self.tower(x), training=training), training=training)
        return self.head(self.drop(ops.mean(x, (1, 2)), training=training))


CONVOLUTIONS = {"stem", "left", "in_block", "in_tower", "in_graph"}


def made(**kwargs):
    keras.utils.set_random_seed(0)
    model = Net(**kwargs)
    x = array(4, 6, 6, 3)
    model(x)
    for variable in model.weights:
        if variable.name in ("gamma", "beta", "moving_mean", "gate"):
            variable.assign(1 + 0.2 * array(*variable.shape))
    return model, x


def state(model):
    return [ops.convert_to_numpy(w).copy() for w in model.weights], [type(layer) for layer in model._flatten_layers()]


def test_the_function_is_kept_and_the_model_untouched():
    model, x = made(name="mine")
    before = ops.convert_to_numpy(model(x))
    weights, kinds = state(model)
    rich = expand(model)
    assert rich_layers(rich) == CONVOLUTIONS
    assert isinstance(rich, Net)
    assert (type(rich).__name__, rich.name, rich.built) == ("Net", "mine", True)
    near(rich(x), before)
    stir(rich)
    changed = ops.convert_to_numpy(rich(x))
    assert np.abs(changed - before).max() > 1e-3
    near(model(x), before, 0)
    after, kinds_after = state(model)
    assert kinds_after == kinds
    for a, b in zip(weights, after):
        np.testing.assert_array_equal(a, b)
    assert not {id(w) for w in model.weights} & {id(w) for w in rich.weights}
    assert rich.again is rich.graph
    plain = fold(rich)
    assert type(plain) is Net
    assert not rich_layers(plain)
    near(plain(x), changed, 1e-4)
    assert [w.shape for w in plain.weights] == [w.shape for w in model.weights]
    assert [w.path for w in plain.weights if "norm" not in w.path] == [
        w.path for w in model.weights if "norm" not in w.path
    ]
    model.set_weights(plain.get_weights())
    near(model(x), changed, 1e-4)


@pytest.mark.parametrize("method", ["doconv", "orepa"])
def test_the_copy_trains_and_saves(method, tmp_path):
    model, x = made()
    y = array(4, 1)
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(x, y, epochs=1, verbose=0)
    rich = expand(model, method)
    assert not rich.compiled
    rich.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    old = {w.path: ops.convert_to_numpy(w).copy() for w in rich.trainable_variables}
    rich.fit(x, y, epochs=2, verbose=0)
    trained = [w for w in rich.trainable_variables if w.name in ("D", "vector", "gate", "kernel")]
    assert all(np.abs(ops.convert_to_numpy(w) - old[w.path]).max() > 0 for w in trained)
    expected = rich.predict(x, verbose=0)
    rich.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(again, Net)
    assert rich_layers(again) == rich_layers(rich)
    near(again.predict(x, verbose=0), expected)
    again.fit(x, y, epochs=1, verbose=0)
    rich.save_weights(tmp_path / "w.weights.h5")
    again.load_weights(tmp_path / "w.weights.h5")
    near(again.predict(x, verbose=0), expected)
    plain = fold(again)
    assert type(plain) is Net
    near(plain.predict(x, verbose=0), expected, 1e-4)
    plain.save(tmp_path / "plain.keras")
    near(keras.models.load_model(tmp_path / "plain.keras").predict(x, verbose=0), expected, 1e-4)
    plain.save_weights(tmp_path / "plain.weights.h5")
    model, _ = made()
    model.load_weights(tmp_path / "plain.weights.h5")
    near(model.predict(x, verbose=0), expected, 1e-4)


def test_what_is_expanded_is_found_in_another_process(tmp_path):
    source = textwrap.dedent(
        """
        import sys, numpy as np, keras
        @keras.saving.register_keras_serializable(package="elsewhere")
        class Small(keras.Model):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.conv = keras.layers.Conv2D(2, 3, name="conv")
            def call(self, x):
                return self.conv(x)
        x = np.arange(50, dtype="float32").reshape(1, 5, 5, 2)
        """
    )
    here = {"__name__": "elsewhere"}
    exec(source, here)
    model = here["Small"]()
    model(here["x"])
    rich = expand(model, "orepa")
    rich.save(tmp_path / "m.keras")
    np.save(tmp_path / "y.npy", rich.predict(here["x"], verbose=0))
    read = "import foldconv.keras as f; r = keras.models.load_model('m.keras')\n"
    read += "assert type(r.conv).__name__ == 'OREPAConv2D'; assert isinstance(r, Small)\n"
    read += "np.testing.assert_allclose(r.predict(x, verbose=0), np.load('y.npy'), rtol=1e-5)\n"
    read += "assert type(f.fold(r)) is Small"
    subprocess.run([sys.executable, "-c", source + read], cwd=tmp_path, check=True)


def test_norms_are_taken_in_where_a_graph_says_that_they_follow(tmp_path):
    model, x = made()
    before = ops.convert_to_numpy(model(x, training=False))
    rich = expand(model, "repvgg")
    assert rich_layers(rich) == CONVOLUTIONS
    assert rich.graph.get_layer("in_graph").norm is not None
    assert rich.stem.norm is None
    near(rich(x, training=False), before)
    for layer in rich._flatten_layers():
        if hasattr(layer, "point_norm"):
            layer.point_norm.gamma.assign(0.3 * array(*layer.point_norm.gamma.shape))
    changed = ops.convert_to_numpy(rich(x, training=False))
    assert np.abs(changed - before).max() > 1e-3
    rich.save(tmp_path / "model.keras")
    plain = fold(keras.models.load_model(tmp_path / "model.keras"))
    assert type(plain) is Net
    model.set_weights(plain.get_weights())
    near(model(x, training=False), changed, 1e-4)


def test_a_layer_that_holds_layers_within_a_graph(tmp_path):
    inputs = keras.Input((6, 6, 3))
    y = layers.TimeDistributed(layers.Conv2D(2, 3, name="each"), name="frames")(inputs[:, None])
    model = keras.Model(inputs, [Block(4, name="block")(inputs), y])
    x = array(2, 6, 6, 3)
    before = [ops.convert_to_numpy(y) for y in model(x)]
    rich = expand(model)
    assert rich_layers(rich) == {"in_block", "each"}
    for a, b in zip(rich(x), before):
        near(a, b)
    stir(rich)
    changed = rich(x)
    rich.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(again(x), changed):
        near(a, b, 1e-6)
    plain = fold(again)
    assert [type(layer) for layer in plain.layers] == [type(layer) for layer in model.layers]
    model.set_weights(plain.get_weights())
    for a, b in zip(model(x), changed):
        near(a, b, 1e-4)


class Loose(keras.Model):
    """A constructor that takes no keywords, what leads to the model itself, and a variable before the others."""

    def __init__(self, hold=None):
        super().__init__()
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")
        self.conv = layers.Conv2D(2, 3, name="conv")
        self.pair = (layers.Conv2D(2, 3), 3)
        self.partial = functools.partial(type(self).apply, self)
        self.numbers, self.seen, self.added = np.arange(3), [], None
        self.hold = hold
        if hold is not None:
            self.held = HOLDS[hold](self.conv)

    def get_config(self):
        return {"hold": self.hold}

    def apply(self, x):
        return self.scale * (self.conv(x) + self.pair[0](x))

    def call(self, x):
        self.seen.append("called")
        return self.partial(x) + float(self.numbers[0])


class Holder:
    def __init__(self, layer):
        self.layer = layer


HOLDS = {
    "cell": lambda conv: lambda x: conv(x),
    "method": lambda conv: conv.call,
    "Holder": Holder,
    "dict": lambda conv: {"layer": Holder(conv)},
}


def test_what_has_changed_since_the_constructor_is_carried_over():
    model, x = Loose(), array(2, 5, 5, 2)
    model(x)
    model.scale.assign(2.0)
    model.numbers[0] = 5
    model.conv.added_later, model.added = "kept", {"more": [1, np.ones(2)]}
    model.pair[0].trainable = False
    before, seen = ops.convert_to_numpy(model(x)), len(model.seen)
    rich = expand(model)
    near(rich(x), before)
    assert rich.weights[0].name == "scale"
    assert isinstance(rich.pair[0], DOConv2D)
    assert [not layer.trainable_variables for layer in (rich.conv, rich.pair[0])] == [False, True]
    assert rich.added["more"][0] == 1
    assert rich.added["more"][1] is not model.added["more"][1]
    assert len(model.seen) == seen
    rich.conv.bias.assign([100.0, 100.0])
    rich.numbers[0] = 7
    near(model(x), before, 0)
    near(rich(x), before + 202, 1e-4)
    near(fold(rich)(x), before + 202, 1e-4)


@pytest.mark.parametrize("hold", HOLDS)
def test_a_layer_held_where_it_cannot_be_replaced_is_refused(hold):
    model = Loose(hold)
    model(array(1, 5, 5, 2))
    with pytest.raises(UnsupportedError, match=r"^conv: a .* would go on using what it was before; hold "):
        expand(model)
    assert isinstance(expand(model, exclude="conv").pair[0], DOConv2D)


def test_what_cannot_be_made_again_is_refused():
    class Needy(keras.Model):
        def __init__(self, *numbers):
            super().__init__(name="needy")
            self.conv = layers.Conv2D(2, 3)

        def call(self, x):
            return self.conv(x)

        def get_config(self):
            raise NotImplementedError("no config\nhere")

    x = array(1, 5, 5, 2)
    model = Needy(1, 2)
    model(x)
    with pytest.raises(UnsupportedError, match="needy: Keras cannot make it again: no config here; define get_config"):
        expand(model)

    class Live(keras.Model):
        def __init__(self, conv):
            super().__init__(name="live")
            self.conv = conv

        def call(self, x):
            return self.conv(x)

        def get_config(self):
            return {"conv": self.conv}

    model = Live(layers.Conv2D(2, 3))
    model(x)
    with pytest.raises(UnsupportedError, match="live: its config holds layers, which a copy would share"):
        expand(model)
    assert type(model.conv) is layers.Conv2D
    model = Loose()
    model(x)
    model.extra = lambda x: model.conv(x)
    with pytest.raises(
        UnsupportedError, match=r"loose.*\.extra: the constructor does not make the function that it holds"
    ):
        expand(model)


def test_a_backends_own_variable_is_never_shared():
    class Foreign(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = layers.Conv2D(2, 3)
            if keras.backend.backend() == "tensorflow":
                import tensorflow as tf

                self.held = [tf.Variable(1.0)]
            elif keras.backend.backend() == "torch":
                import torch

                self.held = [torch.nn.Parameter(torch.ones(()))]
            else:
                self.held = [np.ones(())]

        def call(self, x):
            return self.conv(x) * self.held[0]

    model, x = Foreign(), array(1, 5, 5, 2)
    before = ops.convert_to_numpy(model(x))
    rich = expand(model)
    near(rich(x), before)
    assert rich.held[0] is not model.held[0]


@registered
class MadeInBuild(layers.Layer):
    """Makes its layers when it learns its input's shape."""

    def build(self, shape):
        self.conv = layers.Conv2D(shape[-1], 3, padding="same", name="late")
        self.conv.build(shape)

    def call(self, x):
        return x + self.conv(x)


@registered
class HoldsOne(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = MadeInBuild()

    def call(self, x):
        return self.block(x)


@pytest.mark.parametrize("whole", [HoldsOne, lambda: keras.Sequential([keras.Input((6, 6, 3)), MadeInBuild()])])
def test_layers_made_in_build_are_loaded(whole, tmp_path):
    model, x = whole(), array(2, 6, 6, 3)
    model(x)
    rich = expand(model)
    stir(rich)
    expected = rich(x)
    rich.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert rich_layers(again) == {"late"}
    near(again(x), expected)
    again.save(tmp_path / "again.keras")
    near(keras.models.load_model(tmp_path / "again.keras")(x), expected)
    near(fold(again)(x), expected)
