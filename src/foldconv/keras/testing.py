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

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import keras

from ..errors import UnsupportedError
from ._cases import (
    assert_close,
    assert_differ,
    cases,
    compiled,
    gradients,
    in_double,
    only_layer,
    randomize,
    trains_otherwise,
)
from ._registry import Method, list_methods, method_of
from .composed import ComposedLayer
from .foldable import add_is_wrong, float64
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
            y = keras.ops.convert_to_numpy(first(turned, training=False) if trains_otherwise(first) else first(turned))
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
        expected = np.moveaxis(compiled(last)(turned), -1, 1)
        assert_close(compiled(first)(x), expected, CLOSE, name)
        try:
            folded = first.fold()
        except UnsupportedError as error:
            assert add_is_wrong(), f"{name}: {error}"  # noqa: PT017
        else:
            assert_close(compiled(folded)(x), expected, CLOSE, name)


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
