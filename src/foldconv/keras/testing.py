"""The conformance battery for methods of Keras, on whichever backend is active: `foldconv.testing` without torch.

In a test file of your own, after your method is registered::

    from foldconv.keras import testing

    @testing.parametrize_with_checks()
    def test_conformance(method, check):
        check(method)

Every check takes a method's config and raises AssertionError when the method falls short. Checks see a method only
through `expand`, `fold` and Keras' own interface of layers, on networks of one convolution and one norm.
"""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import keras

from ..errors import UnsupportedError
from ._registry import Method, list_methods, method_of
from .composed import ComposedLayer
from .foldable import FoldableLayer, add_is_wrong, float64
from .network import expand, fold
from .parameters import exclude_from_weight_decay

CLOSE = 1e-5
EXACT = 1e-10

Check = Callable[[Method], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Decorator: add a check to the battery, named after the function."""

    def run(method: Method) -> None:
        keras.utils.set_random_seed(0)
        function(method)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    CHECKS[function.__name__] = run
    return run


def parametrize_with_checks(methods: Sequence[str | Method] | None = None) -> Any:
    """A pytest decorator: every method (by default every registered one) × every check; see `foldconv.testing`."""
    import pytest

    configs = [method_of(m, {}) for m in (list_methods() if methods is None else methods)]
    pairs = [(m, c) for m in configs for c in CHECKS.values()]
    return pytest.mark.parametrize(("method", "check"), pairs, ids=[f"{m.name}-{c.__name__}" for m, c in pairs])


# ---------------------------------------------------------------------- the convolutions that checks run on


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution of Keras, and the size of the input it is run on."""

    plain: Any
    arguments: dict[str, Any]
    size: tuple[int, ...]
    channels: int = 4

    def __str__(self) -> str:
        return f"{self.plain.__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"

    def network(self, dtype: str = "float32", **more: Any) -> Any:
        """Convolution and norm, with random weights."""
        conv = self.plain(**self.arguments, **more, name="conv", dtype=dtype)
        inputs = keras.Input((*self.size, self.channels), dtype="float32" if "mixed" in dtype else dtype)
        model = keras.Sequential([inputs, conv, keras.layers.BatchNormalization(name="norm", dtype=dtype)])
        randomize(model)
        return model

    def input(self, dtype: str = "float32") -> np.ndarray:
        """A random batch of two."""
        return np.random.normal(size=(2, *self.size, self.channels)).astype(dtype)


def _cases() -> list[Case]:
    one, two, layers = (9,), (7, 8), keras.layers
    base = {"filters": 6, "kernel_size": 3}
    return [
        Case(layers.Conv2D, base | {"padding": "same"}, two),
        Case(layers.Conv2D, base | {"strides": 2, "use_bias": False}, two),
        Case(layers.Conv2D, base | {"padding": "same", "strides": 2, "groups": 2, "activation": "relu"}, two),
        Case(layers.Conv2D, base | {"dilation_rate": 2}, two),
        Case(layers.Conv2D, base | {"kernel_size": (1, 3), "padding": "same", "filters": 4}, two),
        Case(layers.Conv2D, base | {"kernel_size": (2, 4), "groups": 4, "filters": 8}, two),
        Case(layers.Conv2D, base | {"kernel_size": 1}, two),
        Case(layers.Conv1D, base, one),
        Case(layers.Conv1D, base | {"padding": "causal", "dilation_rate": 2}, one),
        Case(layers.Conv3D, {"filters": 3, "kernel_size": (2, 3, 1), "padding": "same"}, (4, 3, 5), 2),
        Case(layers.DepthwiseConv1D, {"kernel_size": 3}, one),
        Case(layers.DepthwiseConv2D, {"kernel_size": 3, "padding": "same"}, two),
        Case(layers.DepthwiseConv2D, {"kernel_size": 3, "strides": 2, "depth_multiplier": 2}, two),
    ]


def cases(method: Method) -> list[Case]:
    """The convolutions that the method applies to.

    >>> len(cases(method_of("doconv", {})))
    12
    """
    found = []
    for case in _cases():
        conv, norm = case.network().layers
        if case.plain in method.layers and method.reason_against(conv, norm if _taken_in(case) else None) is None:
            found.append(case)
    assert found, f"{method.name} applies to none of the convolutions"
    return found


def _taken_in(case: Case) -> bool:
    return "activation" not in case.arguments


def only_layer(model: Any) -> Any:
    """The foldable layer of an expanded `Case.network`."""
    found = [layer for layer in model._flatten_layers() if isinstance(layer, FoldableLayer)]
    assert len(found) == 1, f"expected one foldable layer, found {len(found)}"
    return found[0]


def randomize(model: Any) -> None:
    """Random values in every variable; variances and gammas between a half and one and a half."""
    for variable in model.weights:
        value = np.random.normal(size=variable.shape)
        positive = variable.name in ("gamma", "moving_variance")
        variable.assign(1 + np.tanh(value) / 2 if positive else 0.3 * value)


def assert_close(received: Any, expected: Any, tolerance: float, what: object) -> None:
    """The same shape, and values that differ by at most `tolerance` of the largest expected one."""
    a, b = float64(received), float64(expected)
    assert a.shape == b.shape, f"{what}: expected shape {b.shape}, received {a.shape}"
    error, allowed = np.abs(a - b).max(), tolerance * max(1.0, np.abs(b).max())
    assert error <= allowed, f"{what}: expected a difference of at most {allowed:.1e}, received {error:.1e}"


def assert_differ(received: Any, expected: Any, what: object) -> None:
    """Values that differ by more than rounding."""
    a, b = float64(received), float64(expected)
    assert np.abs(a - b).max() > 1e-3 * np.abs(b).max(), f"{what}: nothing has changed"


def gradients(layer: Any, x: Any, probe: Any, **call: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of ``(layer(x) * probe).sum()``, by the path of the variable below the layer's own, and the output."""
    backend, variables = keras.backend.backend(), layer.trainable_variables
    found: Any
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            y = layer(x, **call)
            loss = keras.ops.sum(y * probe)
        found = tape.gradient(loss, [v.value for v in variables])
    elif backend == "jax":
        import jax

        def compute(values: Any) -> Any:
            y, _ = layer.stateless_call(values, [v.value for v in layer.non_trainable_variables], x, **call)
            return keras.ops.sum(y * probe), y

        found, y = jax.jit(jax.grad(compute, has_aux=True))([v.value for v in variables])
    else:
        y = layer(x, **call)
        keras.ops.sum(y * keras.ops.convert_to_tensor(probe)).backward()
        found = [v.value.grad for v in variables]
    names = [v.path.removeprefix(f"{layer.name}/") for v in variables]
    own = {
        n: np.zeros(v.shape) if g is None else keras.ops.convert_to_numpy(g) for n, v, g in zip(names, variables, found)
    }
    return own, keras.ops.convert_to_numpy(y)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Float64 to the end: JAX has it only where it is asked for, and Keras' norm computes in it on TensorFlow only."""

    def call(self: Any, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        assert not training, "in float64 norms are evaluated only"
        shape = [-1 if axis == self.axis % len(inputs.shape) else 1 for axis in range(len(inputs.shape))]
        mean, variance = (keras.ops.reshape(v, shape) for v in (self.moving_mean, self.moving_variance))
        y = (inputs - mean) / keras.ops.sqrt(variance + self.epsilon)
        y = y * keras.ops.reshape(self.gamma, shape) if self.scale else y
        return y + keras.ops.reshape(self.beta, shape) if self.center else y

    with contextlib.ExitStack() as stack:
        if keras.backend.backend() != "tensorflow":
            stack.enter_context(mock.patch.object(keras.layers.BatchNormalization, "call", call))
        if keras.backend.backend() == "jax":
            import jax

            stack.enter_context(jax.enable_x64(True))
        yield


# ---------------------------------------------------------------------- the function


@check
def preserves_the_function(method: Method) -> None:
    """`expand` leaves the output as it was, the model untouched, and shares no variable with it."""
    for case in cases(method):
        net, x = case.network(), case.input()
        weights, before = net.get_weights(), net(x, training=False)
        rich = expand(net, method)
        layer = only_layer(rich)
        assert type(layer) is method.layers[case.plain], f"{case}: expected {method.layers[case.plain]}"
        assert layer.name == "conv", f"{case}: the name is {layer.name}"
        assert_close(rich(x, training=False), before, CLOSE, case)
        assert not {id(v) for v in net.weights} & {id(v) for v in rich.weights}, f"{case}: a variable is shared"
        randomize(rich)
        for ours, theirs in zip(net.get_weights(), weights):
            assert_close(ours, theirs, 0, case)


@check
def folds_to_what_there_was(method: Method) -> None:
    """On random weights: the folded network computes the same and is the plain one, class, config and weights."""
    for case in cases(method):
        net, x = case.network(), case.input()
        rich = expand(net, method)
        randomize(rich)
        changed = rich(x, training=False)
        assert_differ(changed, net(x, training=False), case)
        plain = fold(rich)
        assert_close(plain(x, training=False), changed, CLOSE, case)
        for ours, theirs in zip(plain.layers, net.layers, strict=True):
            assert type(ours) is type(theirs), f"{case}: expected {type(theirs)}, received {type(ours)}"
            assert ours.get_config() == theirs.get_config(), f"{case}: the folded layer has another config"
            left = vars(ours).keys() - vars(theirs).keys()
            assert not left, f"{case}: the folded layer holds {left}"
        net.set_weights(plain.get_weights())
        assert_close(net(x, training=False), changed, CLOSE, case)


@check
def folds_exactly_in_float64(method: Method) -> None:
    """In float64 nothing is lost, so the layer is computed in float64, too."""
    with in_double():
        for case in cases(method)[:3]:
            net, x = case.network("float64"), case.input("float64")
            rich = expand(net, method)
            randomize(rich)
            y = rich(x, training=False)
            assert keras.backend.standardize_dtype(y.dtype) == "float64", f"{case}: the output is {y.dtype}"
            assert_close(fold(rich)(x, training=False), y, EXACT, case)


@check
def channels_first(method: Method) -> None:
    """The other data format, where the backend can run it; what it folds to everywhere."""
    for case in cases(method):
        if case.arguments.get("padding") == "causal":
            continue
        made = method.layers[case.plain]
        last, first = (made(**case.arguments, data_format=f"channels_{end}") for end in ("last", "first"))
        x = case.input()
        turned = np.moveaxis(x, -1, 1).copy()
        last.build(x.shape)
        first.build(turned.shape)
        randomize(last)
        first.set_weights(last.get_weights())
        plain, expected = first.fold(), last.fold()
        assert plain.data_format == "channels_first", f"{case}: folds to {plain.data_format}"
        for ours, theirs in zip(plain.get_weights(), expected.get_weights(), strict=True):
            assert_close(ours, theirs, CLOSE, case)
        if keras.backend.backend() != "tensorflow":  # its CPU kernels take channels_last only
            y = keras.ops.convert_to_numpy(first(turned, training=False) if _trains(first) else first(turned))
            assert_close(np.moveaxis(y, 1, -1), expected(x), CLOSE, case)


@check
def adds_its_bias_to_the_channels(method: Method) -> None:
    """Where the output is as wide as it has channels, which some of Keras' own layers take for one another; and a fold
    computes the same or is refused."""
    for plain, made in method.layers.items():
        rank, name = int(plain.__name__[-2]), plain.__name__
        layers, filters = [], {} if "Depthwise" in name else {"filters": 4}
        x = np.random.normal(size=(2, 4, *(4,) * rank)).astype("float32")
        turned = np.moveaxis(x, 1, -1).copy()
        for end, shape in (("last", turned.shape), ("first", x.shape)):
            layers.append(made(kernel_size=3, padding="same", data_format=f"channels_{end}", **filters))
            layers[-1].build(shape)
        last, first = layers
        randomize(last)
        first.set_weights(last.get_weights())
        expected = np.moveaxis(_compiled(last)(turned), -1, 1)
        assert_close(_compiled(first)(x), expected, CLOSE, name)
        try:
            folded = first.fold()
        except UnsupportedError as error:
            assert add_is_wrong(), f"{name}: {error}"  # noqa: PT017
        else:
            assert_close(_compiled(folded)(x), expected, CLOSE, name)


def _compiled(layer: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A layer's evaluation; TensorFlow convolves channels_first on a CPU only where that is compiled."""
    evaluate = lambda x: layer(x, training=False) if _trains(layer) else layer(x)  # noqa: E731
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        evaluate = tf.function(evaluate, jit_compile=True)
    return lambda x: keras.ops.convert_to_numpy(evaluate(keras.ops.convert_to_tensor(x)))


def _trains(layer: Any) -> bool:
    """Does a layer compute differently while training?"""
    return "training" in layer._call_signature.parameters if hasattr(layer, "_call_signature") else True


@check
def sizes_may_be_unknown(method: Method) -> None:
    """One traced network serves inputs of several sizes."""
    for case in cases(method)[:3]:
        inputs = keras.Input((*(None for _ in case.size), case.channels))
        net = keras.Model(inputs, case.network().layers[0](inputs))
        rich = expand(net, method, include="conv") if method.reason_against(net.layers[-1]) is None else None
        if rich is None:
            continue
        randomize(rich)
        plain = fold(rich)
        for cut in (0, 1):
            x = case.input()[:, cut:]
            assert_close(rich.predict(x, verbose=0), plain.predict(x, verbose=0), CLOSE, case)


@check
def graphs_of_every_kind(method: Method) -> None:
    """Functional networks with branches, nested and shared ones, keep their function expanded and folded."""
    case = cases(method)[0]
    inner = case.network()
    inputs = keras.Input((*case.size, case.channels))
    y = inner(inputs)
    model = keras.Model(inputs, [keras.layers.Add()([y, inner(inputs * 2.0)]), y])
    x = case.input()
    rich = expand(model, method)
    for ours, theirs in zip(rich(x, training=False), model(x, training=False), strict=True):
        assert_close(ours, theirs, CLOSE, case)
    only_layer(rich)
    randomize(rich)
    for ours, theirs in zip(fold(rich)(x, training=False), rich(x, training=False), strict=True):
        assert_close(ours, theirs, CLOSE, case)


# ---------------------------------------------------------------------- the layer as one of Keras


@check
def takes_the_base_layers_arguments(method: Method) -> None:
    """Made directly: the plain layer's arguments and, first among the weights, its weights, with what acts on them."""
    for case in cases(method):
        kernel = "depthwise" if "Depthwise" in case.plain.__name__ else "kernel"
        more = {f"{kernel}_regularizer": "l2", f"{kernel}_constraint": "non_neg", "bias_regularizer": "l1"}
        layer, plain = (cls(**case.arguments, **more, name="conv") for cls in (method.layers[case.plain], case.plain))
        x = case.input()
        y = layer(x)
        plain.build(x.shape)
        expected = [(w.name, tuple(w.shape)) for w in plain.weights]
        own = [(w.name, tuple(w.shape)) for w in layer.weights][: len(expected)]
        assert own == expected, f"{case}: expected the weights {expected} first, received {own}"
        for ours, theirs in zip(layer.weights, plain.weights):
            for what in ("regularizer", "constraint"):
                kinds = [type(getattr(w, what)).__name__ for w in (ours, theirs)]
                assert kinds[0] == kinds[1], f"{case}: {what} of {ours.name}: {kinds[0]}"
        constrained = [w.name for w in layer.weights if w.constraint is not None]
        assert len(constrained) == 1, f"{case}: constraints act on {constrained}"
        theirs = plain.get_config()
        config = {key: value for key, value in layer.get_config().items() if key in theirs}
        initializer = f"{kernel}_initializer"  # the paper may have its own
        assert {**config, initializer: None} == {**theirs, initializer: None}, f"{case}: the config is {config}"
        shape = tuple(plain.compute_output_shape(x.shape))
        assert tuple(y.shape) == shape, f"{case}: expected shape {shape}, received {tuple(y.shape)}"
        assert tuple(layer.compute_output_shape(x.shape)) == shape, f"{case}: compute_output_shape"
        assert np.isfinite(float64(y)).all(), f"{case}: not finite"


@check
def is_made_again_from_its_config(method: Method) -> None:
    """Serialized and made again, a layer has the same config and, with the same weights, the same output."""
    for case in cases(method):
        net, x = case.network(), case.input()
        layer = only_layer(expand(net, method))
        randomize(layer)
        again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
        assert type(again) is type(layer), f"{case}: came back as {type(again)}"
        assert again.get_config() == layer.get_config(), f"{case}: another config"
        if not again.built:
            again.build(x.shape)
        again.set_weights(layer.get_weights())
        assert_close(again(x), layer(x), 1e-6, case)


@check
def saves_and_loads(method: Method) -> None:
    """A ``.keras`` file and a file of weights bring the function back."""
    for case in cases(method)[:3]:
        net, x = case.network(), case.input()
        rich = expand(net, method)
        randomize(rich)
        expected = rich(x, training=False)
        with tempfile.TemporaryDirectory() as folder:
            rich.save(Path(folder, "net.keras"))
            again = keras.models.load_model(Path(folder, "net.keras"))
            rich.save_weights(Path(folder, "net.weights.h5"))
            other = expand(net, method)
            other.load_weights(Path(folder, "net.weights.h5"))
        assert type(only_layer(again)) is type(only_layer(rich)), f"{case}: came back as {again.layers}"
        for loaded in (again, other):
            assert_close(loaded(x, training=False), expected, 1e-6, case)


@check
def mixed_precision(method: Method) -> None:
    """Variables stay in float32 and the output is half; a composed kernel is rounded once, after it is composed."""
    case = cases(method)[0]
    net = case.network("mixed_bfloat16")
    rich = expand(net, method)
    randomize(rich)
    kinds = {keras.backend.standardize_dtype(w.dtype) for w in rich.weights}
    assert kinds == {"float32"}, f"{case}: variables in {kinds}"
    x = case.input()
    layer: Any = only_layer(rich)
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16", f"{case}: the output is {y.dtype}"
    assert_close(rich(x, training=False), fold(rich)(x, training=False), 0.05, case)
    if issubclass(type(layer), ComposedLayer):
        seen: list[Any] = []
        compose = layer.compose
        # Seen where it is composed: the autocast that Keras puts around `call` must not have reached the factors.
        with mock.patch.object(layer, "compose", lambda kernel: seen.append(compose(kernel)) or seen[-1]):
            layer(x)
        want = keras.ops.cast(keras.ops.convert_to_tensor(layer.folded()[0].astype("float32")), "bfloat16")
        differ = np.mean(float64(keras.ops.cast(seen[0], "float32")) != float64(keras.ops.cast(want, "float32")))
        # A few entries lie at the border of two numbers of bfloat16.
        assert differ < 0.02, f"{case}: {differ:.0%} of the kernel's entries are rounded otherwise than once"


@check
def folding_needs_weights(method: Method) -> None:
    """A layer that was not built refuses to fold, in our words."""
    case = cases(method)[0]
    layer = method.layers[case.plain](**case.arguments, name="bare")
    message = "none"
    try:
        layer.fold()
    except UnsupportedError as error:
        message = str(error)
    assert "bare: it has no weights yet" in message, f"folding without weights: expected a refusal, got {message!r}"


# ---------------------------------------------------------------------- training


@check
def gradients_reach_every_parameter(method: Method) -> None:
    """Every trainable variable has a gradient that is finite and somewhere not zero."""
    for case in cases(method)[:3]:
        rich, x = expand(case.network(), method), case.input()
        randomize(rich)
        probe = np.random.normal(size=rich.compute_output_shape(x.shape)).astype("float32")
        found, _ = gradients(rich, x, probe, training=False)
        for name, gradient in found.items():
            assert np.isfinite(gradient).all(), f"{case}: {name}: not finite"
            assert np.abs(gradient).max() > 1e-7, f"{case}: {name}: no gradient"


@check
def trains(method: Method) -> None:
    """A few steps move the output and new variables; what was trained folds, saves, goes on; what is frozen stays."""
    case = cases(method)[0]
    net, x = case.network(), case.input()
    rich = expand(net, method)
    layer = only_layer(rich)
    base, start = net(x, training=False), {w.path: float64(w) for w in layer.trainable_variables}
    # torch's compiler takes minutes here; its eager mode is what people run.
    rich.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=keras.backend.backend() != "torch")
    target = np.random.normal(size=base.shape).astype("float32")
    before = rich.evaluate(x, target, verbose=0)
    rich.fit(x, target, epochs=4, verbose=0)
    after = rich.evaluate(x, target, verbose=0)
    assert after < before, f"{case}: the loss went from {before} to {after}"
    trained = rich.predict(x, verbose=0)
    assert_differ(trained, base, case)
    still = [w.path for w in layer.trainable_variables if np.array_equal(float64(w), start[w.path])]
    assert len(still) < len(start) - len(case.network().layers[0].weights), f"{case}: nothing new has moved"
    assert_close(fold(rich).predict(x, verbose=0), trained, 1e-4, case)
    with tempfile.TemporaryDirectory() as folder:
        rich.save(Path(folder, "net.keras"))
        again = keras.models.load_model(Path(folder, "net.keras"))
    for ours, theirs in zip(again.optimizer.variables, rich.optimizer.variables, strict=True):
        assert_close(ours, theirs, 0, case)
    again.fit(x, target, verbose=0)
    frozen = case.network(trainable=False)
    frozen.layers[1].trainable = False
    rich = expand(frozen, method)
    assert rich.trainable_variables == [], f"{case}: of a frozen layer {rich.trainable_variables} train"
    assert not fold(rich).layers[0].trainable, f"{case}: thawed by folding"


@check
def weight_decay_leaves_real_variables_alone(method: Method) -> None:
    """`no_decay` names variables that exist, and `exclude_from_weight_decay` finds them."""
    for case in cases(method):
        rich = expand(case.network(), method)
        layer = only_layer(rich)
        own, factors = {id(w): w.path for w in layer.weights}, layer.present()
        assert all(id(v) in own for v in factors.values()), f"{case}: factors {list(factors)} are no weights of it"
        assert factors or layer.losses or len(own) > 2, f"{case}: no variable beside the plain layer's"
        unknown = layer.no_decay - set(layer.factors)
        assert not unknown, f"{case}: no_decay names {unknown}, which are none of {layer.factors}"
        found = exclude_from_weight_decay(keras.optimizers.AdamW(weight_decay=0.1), rich)
        for name in layer.no_decay & factors.keys():
            assert factors[name].path in found, f"{case}: {name} decays"
        kernel = layer.weights[0].path
        assert kernel not in found, f"{case}: {kernel} does not decay"
