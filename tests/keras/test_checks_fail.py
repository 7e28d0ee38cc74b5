"""No check of Keras' battery passes vacuously: each fails on a method broken for that purpose."""

import dataclasses

import numpy as np
import pytest

import keras
from foldconv.errors import UnsupportedError
from foldconv.keras import DOConv2D, testing
from foldconv.keras.doconv import DOConv
from keras import ops


@keras.saving.register_keras_serializable(package="tests")
class Sound(DOConv2D):
    """DO-Conv under another name."""


def broken(cls=Sound, **attributes):
    """DO-Conv of two dimensions with another layer, or with some attributes of its config replaced."""
    own = {"layers": {keras.layers.Conv2D: cls}, "options_for": lambda self, layer, norm=None: {}}
    return dataclasses.dataclass(frozen=True)(type("Broken", (DOConv,), {"__doc__": "x", **own, **attributes}))()


def layer_with(**overrides):
    """Such a method whose layer overrides some methods; each override gets the original as its first argument."""

    def bind(name, function):
        return lambda layer, *args, **kwargs: function(
            getattr(super(mutant, layer), name, None), layer, *args, **kwargs
        )

    mutant = type("Mutant", (Sound,), {})
    for name, function in overrides.items():
        setattr(mutant, name, bind(name, function))
    keras.saving.register_keras_serializable(package="tests")(mutant)
    return broken(mutant)


def layer_of(**attributes):
    """Such a method whose layer has some class attributes replaced."""
    mutant = type("Mutant", (Sound,), attributes)
    keras.saving.register_keras_serializable(package="tests")(mutant)
    return broken(mutant)


def add_to_D(self, layer, norm=None):
    layer.D.assign(np.full(layer.D.shape, 1e-2))


def keep_an_attribute(original, layer, *args):
    plain = original(*args)
    plain.composed_by = "us"
    return plain


def single(original, layer):
    kernel, bias = original()
    return kernel.astype("float32").astype("float64"), bias


def first_as_last(original, layer, *args):
    plain = original(*args)
    if layer.data_format == "channels_first":
        plain.kernel.assign(ops.flip(plain.kernel, 0))
    return plain


def call_that_asks_for_the_size(layer, x):
    return DOConv2D.call(layer, x) * (1.0 if x.shape[1] is None else 2.0)


def adds_along_the_width(layer, x):
    return layer.convolve(x, layer.kernel, layer.strides, layer.padding, layer.dilation_rate) + layer.bias


def no_activation(original, layer):
    return {**original(), "activation": "linear"}


def forgets_D(original, layer, store):
    original(store)
    layer.D.assign(np.zeros(layer.D.shape))


def half_way(original, layer, kernel):
    with keras.src.backend.common.variables.AutocastScope(None):
        factors = {name: ops.cast(ops.cast(f, "bfloat16"), "float32") for name, f in layer.present().items()}
    return ops.cast(layer.composed(ops.cast(kernel, "float32"), factors, ops), layer.compute_dtype)


def folds_without(original, layer):
    if not layer.built:
        layer.build((None, 7, 8, 4))
    return original()


def no_gradient(original, layer, kernel, factors, array):
    stop = (lambda x: x) if array is np else ops.stop_gradient
    return original(kernel, {name: stop(factor) for name, factor in factors.items()}, array)


def thaws(original, layer, *args):
    plain = original(*args)
    plain.trainable = True
    return plain


MUTANTS = {
    "preserves_the_function": broken(preserve=add_to_D),
    "folds_to_what_there_was": layer_with(realize=keep_an_attribute),
    "folds_exactly_in_float64": layer_with(folded=single),
    "channels_first": layer_with(realize=first_as_last),
    "adds_its_bias_to_the_channels": layer_of(call=adds_along_the_width),
    "sizes_may_be_unknown": layer_of(call=call_that_asks_for_the_size),
    "graphs_of_every_kind": broken(preserve=add_to_D),
    "takes_the_base_layers_arguments": layer_with(get_config=no_activation),
    "is_made_again_from_its_config": layer_with(get_config=lambda original, layer: {**original(), "strides": (1, 1)}),
    "saves_and_loads": layer_with(load_own_variables=forgets_D),
    "mixed_precision": layer_with(compose=half_way),
    "folding_needs_weights": layer_with(fold=folds_without),
    "gradients_reach_every_parameter": layer_with(composed=no_gradient),
    "trains": layer_with(realize=thaws),
    "weight_decay_leaves_real_variables_alone": layer_of(no_decay=frozenset({"vector"})),
}


def test_every_check_has_a_mutant():
    assert MUTANTS.keys() == testing.CHECKS.keys()


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_fails_on_its_mutant(name):
    with pytest.raises((AssertionError, UnsupportedError)):
        testing.CHECKS[name](MUTANTS[name])


@pytest.mark.parametrize("name", MUTANTS)
def test_a_sound_method_passes(name):
    testing.CHECKS[name](broken())
