"""DO-Conv as subclasses of Keras' convolutions: only how the kernel is made differs."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import math
from typing import Any

import numpy as np

import keras

from ..errors import UnsupportedError
from . import _algebra


def multiplier_of(argument: str, given: Any, kernel_size: tuple[int, ...]) -> int:
    """S, the taps of D per position, or an UnsupportedError naming the argument."""
    taps = math.prod(kernel_size)
    multiplier = taps if given is None else given
    if not isinstance(multiplier, int) or isinstance(multiplier, bool) or multiplier < taps:
        raise UnsupportedError(
            f"{argument}: expected an integer ≥ {taps}, the taps of a kernel of size {kernel_size}, "
            f"received {given!r}; fewer could not express every kernel"
        )
    return multiplier if taps > 1 else 1


class DOLayer:
    """What all DO-Conv layers of Keras share; a mixin before Keras' own layer.

    Attributes:
        D: ``(input channels, k, S)``, what is added to the identity; None for a kernel of one tap.
        kernel_extra: the S - k surplus taps, ``(S - k, *kernel.shape[-2:])``; None when S = k.
    """

    plain: Any  # the Keras layer that it folds to
    argument = "depth_multiplier"  # what S is called among the layer's arguments
    D: Any = None
    kernel_extra: Any = None

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Keras' own, but what the kernel is composed from stays in its own precision until it is composed."""
        if kwargs.get("name") in ("kernel", "D", "kernel_extra"):
            kwargs["autocast"] = False
        return super().add_weight(*args, **kwargs)

    def add_factors(self: Any, multiplier: int, groups: int) -> None:
        """Make D, which adds nothing yet, and the surplus taps, drawn so that D has something to learn."""
        *size, channels, out = self._kernel.shape
        taps = math.prod(size)
        if taps == 1:
            return
        self.D = self.add_weight(
            name="D", shape=(groups * channels, taps, multiplier), initializer="zeros", dtype=self.variable_dtype
        )
        if multiplier > taps:
            bound = 1 / math.sqrt(taps * (channels if hasattr(self, "groups") else 1))  # inputs of an output
            self.kernel_extra = self.add_weight(
                name="kernel_extra",
                shape=(multiplier - taps, channels, out),
                initializer=keras.initializers.RandomUniform(-bound, bound),
                dtype=self.variable_dtype,
            )

    def compose(self: Any, kernel: Any) -> Any:
        """The kernel to convolve with, composed in float32 or better, in the compute dtype."""
        if self.D is None:
            return keras.ops.cast(kernel, self.compute_dtype)
        precise = keras.backend.result_type(self.variable_dtype, "float32")
        parts = [kernel, self.kernel_extra, self.D]
        kernel, extra, D = (None if p is None else keras.ops.cast(p, precise) for p in parts)
        return keras.ops.cast(_algebra.doconv(kernel, extra, D, getattr(self, "groups", 1)), self.compute_dtype)

    def folded_kernel(self: Any) -> np.ndarray:
        """The composed kernel in the shape of ``kernel``, computed in float64."""
        kernel = _float64(self.own_kernel)
        if self.D is None:
            return kernel
        extra = None if self.kernel_extra is None else _float64(self.kernel_extra)
        return _algebra.doconv(kernel, extra, _float64(self.D), getattr(self, "groups", 1), np)

    def fold(self: Any) -> Any:
        """The plain Keras layer of the same name that computes the same: built, with the composed kernel.

        LoRA weights are merged into the kernel.

        Raises:
            UnsupportedError: for a layer that has no weights yet.
        """
        if not self.built:
            raise UnsupportedError(f"{self.name}: it has no weights yet; call it, or build it, before folding")
        config = self.get_config()
        for name in (self.argument, "lora_rank", "lora_alpha"):
            config.pop(name, None)
        layer = self.plain.from_config(config)
        layer.build_from_config(self.get_build_config())
        layer.set_weights([self.folded_kernel(), *([self.bias] if self.use_bias else [])])
        return layer


def _float64(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)


class _DOConv(DOLayer):
    """DO-Conv for `keras.layers.Conv1D` to `Conv3D`."""

    def __init__(self, *args: Any, depth_multiplier: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.depth_multiplier = multiplier_of("depth_multiplier", depth_multiplier, self.kernel_size)

    def build(self: Any, input_shape: Any) -> None:
        """Make Keras' own weights, then D and the surplus taps, then LoRA's."""
        # Keras closes the layer to new weights where it makes LoRA's.
        rank, self.lora_rank = self.lora_rank, None
        super().build(input_shape)
        self.add_factors(self.depth_multiplier, self.groups)
        if rank:
            self.enable_lora(rank, lora_alpha=self.lora_alpha)

    @property
    def own_kernel(self) -> Any:
        """Keras' own kernel, before it is composed; with LoRA's part where that is enabled."""
        return super().kernel

    @property
    def kernel(self) -> Any:
        """The composed kernel, in the compute dtype; the variable that is trained is among ``weights``."""
        return self.compose(self.own_kernel)

    def save_own_variables(self: Any, store: Any) -> None:
        """Keras' own keys, and D and kernel_extra by name; as in Keras, LoRA is merged into the kernel."""
        if not self.built:
            return
        store["0"] = self.own_kernel
        if self.use_bias:
            store["1"] = self.bias
        for name in ("D", "kernel_extra"):
            if getattr(self, name) is not None:
                store[name] = getattr(self, name)

    def load_own_variables(self: Any, store: Any) -> None:
        """The inverse of `save_own_variables`."""
        super().load_own_variables(store)
        for name in ("D", "kernel_extra"):
            if self.built and getattr(self, name) is not None:
                getattr(self, name).assign(store[name])

    def get_config(self) -> dict[str, Any]:
        """Keras' own config and `depth_multiplier`."""
        return {**super().get_config(), "depth_multiplier": self.depth_multiplier}


class _DODepthwise(DOLayer):
    """DO-DConv for `keras.layers.DepthwiseConv1D` and `DepthwiseConv2D`, whose `depth_multiplier` is another thing."""

    argument = "D_mul"

    def __init__(self, *args: Any, D_mul: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.D_mul = multiplier_of("D_mul", D_mul, self.kernel_size)

    def build(self, input_shape: Any) -> None:
        """Make Keras' own weights, then D and the surplus taps."""
        super().build(input_shape)
        self.add_factors(self.D_mul, 1)

    @property
    def own_kernel(self) -> Any:
        """Keras' own kernel, before it is composed."""
        return self._kernel

    @property
    def kernel(self) -> Any:
        """The composed kernel, in the compute dtype; the variable that is trained is among ``weights``."""
        return self.compose(self._kernel)

    @kernel.setter
    def kernel(self, variable: Any) -> None:
        self._kernel = variable  # Keras' build assigns it

    def get_config(self) -> dict[str, Any]:
        """Keras' own config and `D_mul`."""
        return {**super().get_config(), "D_mul": self.D_mul}


_registered = keras.saving.register_keras_serializable(package="foldconv")


@_registered
class DOConv1D(_DOConv, keras.layers.Conv1D):
    """``keras.layers.Conv1D`` that trains as a DO-Conv; arguments, shapes, errors and source as in `DOConv2D`.

    Example:
        >>> DOConv1D(8, 3, padding="causal")(keras.ops.zeros((1, 9, 4))).shape[1:] == (9, 8)
        True
    """

    plain = keras.layers.Conv1D


@_registered
class DOConv2D(_DOConv, keras.layers.Conv2D):
    """``keras.layers.Conv2D`` that trains as a DO-Conv: its arguments, then by keyword

    Args:
        depth_multiplier: S, taps of D per position; an integer ≥ the taps of the kernel, by default equal to them.

    Shapes:
        input, output, the variables ``kernel`` and ``bias`` as in the plain layer, with their regularizers and
        constraints; ``D``: ``(in, k, S)``, k the taps of the kernel, absent when k = 1; ``kernel_extra``:
        ``(S - k, in / groups, filters)``, absent when S = k.

    Raises:
        UnsupportedError: for a `depth_multiplier` below the taps of the kernel.

    Source: Cao et al., "DO-Conv", TIP 2022, eq. 2-4.

    Example:
        >>> layer = DOConv2D(8, 3, padding="same")
        >>> x = keras.random.normal((1, 6, 6, 4))
        >>> y = layer(x)
        >>> plain = layer.fold()
        >>> type(plain).__name__, tuple(plain.kernel.shape)
        ('Conv2D', (3, 3, 4, 8))
        >>> bool(keras.ops.max(keras.ops.abs(plain(x) - y)) < 1e-5)
        True
    """

    plain = keras.layers.Conv2D


@_registered
class DOConv3D(_DOConv, keras.layers.Conv3D):
    """``keras.layers.Conv3D`` that trains as a DO-Conv; arguments, shapes, errors and source as in `DOConv2D`.

    Example:
        >>> DOConv3D(3, 3)(keras.ops.zeros((1, 5, 5, 5, 2))).shape[1:] == (3, 3, 3, 3)
        True
    """

    plain = keras.layers.Conv3D


@_registered
class DODepthwiseConv1D(_DODepthwise, keras.layers.DepthwiseConv1D):
    """``keras.layers.DepthwiseConv1D`` that trains as a DO-DConv; the rest as in `DODepthwiseConv2D`.

    Example:
        >>> DODepthwiseConv1D(3)(keras.ops.zeros((1, 5, 2))).shape[1:] == (3, 2)
        True
    """

    plain = keras.layers.DepthwiseConv1D


@_registered
class DODepthwiseConv2D(_DODepthwise, keras.layers.DepthwiseConv2D):
    """``keras.layers.DepthwiseConv2D`` that trains as a DO-DConv: its arguments, then by keyword

    Args:
        D_mul: S, taps of D per position, as `depth_multiplier` is in `DOConv2D`; Keras' own `depth_multiplier`, the
            outputs per input channel, keeps its meaning.

    Shapes:
        the variables ``kernel`` and ``bias`` as in the plain layer; ``D``: ``(in, k, S)``; ``kernel_extra``:
        ``(S - k, in, depth_multiplier)``, absent when S = k.

    Raises:
        UnsupportedError: for a `D_mul` below the taps of the kernel.

    Source: Cao et al., "DO-Conv", TIP 2022, section III-C.

    Example:
        >>> layer = DODepthwiseConv2D(3, depth_multiplier=2, D_mul=12)
        >>> layer(keras.ops.zeros((1, 5, 5, 4))).shape[1:] == (3, 3, 8)
        True
        >>> [tuple(w.shape) for w in layer.weights]
        [(3, 3, 4, 2), (8,), (4, 9, 12), (3, 4, 2)]
    """

    plain = keras.layers.DepthwiseConv2D


#: The DO-Conv layer of each plain one.
RICH: dict[Any, Any] = {c.plain: c for c in (DOConv1D, DOConv2D, DOConv3D, DODepthwiseConv1D, DODepthwiseConv2D)}
