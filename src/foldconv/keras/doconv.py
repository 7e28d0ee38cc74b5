"""DO-Conv (Cao et al., TIP 2022) for Keras: ``K = W + D · W``, D a depthwise kernel before the convolution's own."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import keras

from .. import formulas
from . import _layout
from ._registry import Method, plain_class, register
from .composed import ComposedConv, ComposedDepthwise, ComposedLayer


class DOLayer(ComposedLayer):
    """What all DO-Conv layers of Keras share.

    Attributes:
        D: ``(input channels, k, S)``, what is added to the identity; None for a kernel of one tap.
        kernel_extra: the S - k surplus taps, ``(S - k, *kernel.shape[-2:])``; None when S = k.
    """

    method = "doconv"
    factors = ("D", "kernel_extra")
    D: Any = None
    kernel_extra: Any = None

    def add_factors(self: Any, input_shape: Any) -> None:
        """Make D, which adds nothing yet, and the surplus taps, drawn so that D has something to learn."""
        (groups, channels), shape, multiplier = self.decomposition, self._kernel.shape, getattr(self, self.options[0])
        taps = math.prod(shape[:-2])
        if taps == 1:
            return
        self.add_factor("D", (groups * channels, taps, multiplier), "zeros")
        if multiplier > taps:
            bound = 1 / math.sqrt(taps * channels)  # inputs of an output
            uniform = keras.initializers.RandomUniform(-bound, bound)
            self.add_factor("kernel_extra", (multiplier - taps, *shape[-2:]), uniform)

    def composed(self, kernel: Any, factors: dict[str, Any], array: Any) -> Any:
        """``W + D · W`` on the taps of W."""
        D, extra = factors["D"], factors.get("kernel_extra")
        (groups, channels), (taps, multiplier) = self.decomposition, D.shape[1:]
        W = _layout.common(kernel, groups, channels, array)
        if extra is not None:
            W = array.concatenate([W, _layout.common(extra, groups, channels, array)], axis=2)
        D = array.reshape(D, (groups, channels, taps, multiplier))
        return _layout.back(formulas.doconv(W, D, taps, _layout.PRIMITIVES), kernel.shape, array)


class _DOConv(DOLayer, ComposedConv):
    """DO-Conv for `keras.layers.Conv1D` to `Conv3D`."""

    options = ("depth_multiplier",)

    def __init__(self, *args: Any, depth_multiplier: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.depth_multiplier = formulas.doconv_multiplier(depth_multiplier, self.kernel_size)  # pyright: ignore


class _DODepthwise(DOLayer, ComposedDepthwise):
    """DO-DConv for `keras.layers.DepthwiseConv1D` and `DepthwiseConv2D`, whose `depth_multiplier` is another thing."""

    options = ("D_mul",)

    def __init__(self, *args: Any, D_mul: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.D_mul = formulas.doconv_multiplier(D_mul, self.kernel_size, "D_mul")  # pyright: ignore


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


RICH: dict[Any, Any] = {c.plain: c for c in (DOConv1D, DOConv2D, DOConv3D, DODepthwiseConv1D, DODepthwiseConv2D)}


@register
@dataclasses.dataclass(frozen=True)
class DOConv(Method):
    """DO-Conv for `expand`.

    Args:
        depth_multiplier: S of every layer; None: its taps.
    """

    depth_multiplier: int | None = None

    name: ClassVar[str] = "doconv"
    layers: ClassVar[dict[Any, Any]] = RICH

    def reason_against(self, layer: Any, norm: Any = None) -> str | None:
        """A kernel of one tap has no D."""
        return formulas.DOCONV_OF_ONE_TAP if math.prod(layer.kernel_size) == 1 else None

    def options_for(self, layer: Any, norm: Any = None) -> dict[str, Any]:
        """The multiplier, by the name that it has among the layer's arguments."""
        return {RICH[plain_class(layer)].options[0]: self.depth_multiplier}
