"""What the checks of `foldconv.keras.testing` run on, and what they compare with."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

import keras

from ._registry import Method
from .foldable import FoldableLayer, float64


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


@functools.cache
def _to_look_at() -> list[tuple[Case, Any, Any]]:
    """Each case with a convolution and a norm that methods only look at, made once."""
    return [(case, *case.network().layers) for case in _cases()]


def cases(method: Method) -> list[Case]:
    """The convolutions that the method applies to.

    >>> from foldconv.keras._registry import method_of
    >>> len(cases(method_of("doconv", {})))
    12
    """
    found = []
    for case, conv, norm in _to_look_at():
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


def compiled(layer: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A layer's evaluation; TensorFlow convolves channels_first on a CPU only where that is compiled."""

    def evaluate(x: Any) -> Any:
        return layer(x, training=False) if trains_otherwise(layer) else layer(x)

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        run = tf.function(evaluate, jit_compile=True)
    else:
        run = evaluate
    return lambda x: keras.ops.convert_to_numpy(run(keras.ops.convert_to_tensor(x)))


def trains_otherwise(layer: Any) -> bool:
    """Does a layer compute differently while training?"""
    return "training" in layer._call_signature.parameters if hasattr(layer, "_call_signature") else True
