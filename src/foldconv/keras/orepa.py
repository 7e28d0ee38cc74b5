"""OREPA (Hu et al., CVPR 2022) for Keras: the kernel is a sum of branches, each with a learned scale per output.

The equation, the cosines and the initial values are those at the top of `foldconv.methods.orepa`; the variables have
the names of its parameters, in Keras' layout, and ``kernel`` is the origin branch. Constructed directly the layer
starts as in the paper, where a norm follows it; `expand` gives only the origin branch a scale, so that the function is
kept.
"""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, ClassVar

import numpy as np

import keras

from .. import formulas
from .._arguments import expect_flags
from ..errors import UnsupportedError
from ..formulas import OrepaParts
from . import _layout
from ._registry import Method, register
from .composed import ComposedConv, ComposedDepthwise, ComposedLayer


class OREPALayer(ComposedLayer):
    """What all OREPA layers of Keras share.

    Attributes:
        vector: ``(branches, filters)``, the scales.
    """

    method = "orepa"
    options = ("point",)
    no_decay = frozenset({"vector"})
    factors = ("avg_conv", "prior_conv", "kxk_idconv1", "kxk_conv2", "conv_1x1", "gconv_dw", "gconv_pw")
    factors += ("l2i_conv1", "l2i_conv2", "vector")
    avg_conv = prior_conv = kxk_idconv1 = kxk_conv2 = conv_1x1 = gconv_dw = gconv_pw = None
    l2i_conv1 = l2i_conv2 = None
    vector: Any = None
    initializer: ClassVar[str]
    _identity: np.ndarray
    _cosines: np.ndarray
    _centre: np.ndarray

    def __init__(self: Any, *args: Any, point: bool = True, **kwargs: Any):
        expect_flags(point=point)
        given = inspect.signature(self.plain).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        if self.initializer not in given:
            size = given.get("kernel_size", 1)
            taps = math.prod(size) if hasattr(size, "__iter__") else size ** int(self.plain.__name__[-2])
            kwargs[self.initializer] = self.draws(taps, formulas.orepa_slope(taps, point))
        super().__init__(*args, **kwargs)
        self.point = point
        refusal = OrepaParts.refusal(self.kernel_size, getattr(self, "groups", None))
        if refusal is not None:
            raise UnsupportedError(f"{self.name}: {refusal}; use {self.plain.__name__}")

    def add_factors(self: Any, input_shape: Any) -> None:
        """Draw the branches and set the scales as the paper does."""
        (groups, i), size = self.decomposition, self.kernel_size
        out = math.prod(self._kernel.shape[-2:]) // i
        parts = OrepaParts(groups * i, out, size, groups, self.point)
        slope = formulas.orepa_slope(parts.taps, self.point)
        for name, (outputs, inputs, *window) in list(parts.shapes().items())[1:-1]:
            shape = (*window, groups * i, parts.FILTERS) if name == "gconv_dw" else (*window, inputs, outputs)
            zero = name == parts.undrawn and parts.taps > 1
            self.add_factor(name, shape, "zeros" if zero else _kaiming(inputs * math.prod(window), slope))
        if parts.taps == 1:
            narrow = getattr(self, parts.undrawn)
            narrow.assign(np.eye(narrow.shape[-1]).reshape(narrow.shape))
        else:
            # What is not learned, made here: compilers would otherwise trace how.
            self._identity = np.tile(np.eye(i), (1, self.kxk_conv2.shape[-2] // i))
            self._cosines = _cosines(out, size, groups)
            self._centre = _layout.at_centre(size)
        self.add_factor("vector", (len(parts.scales), out), "zeros")
        self.vector.assign(np.repeat(np.array(parts.scales)[:, None], out, axis=1))

    def composed(self, kernel: Any, factors: dict[str, Any], array: Any) -> Any:
        """The sum of the scaled branches."""
        (groups, i), p, size = self.decomposition, _layout.PRIMITIVES, kernel.shape[:-2]
        f, taps = factors, math.prod(size)
        vector = f["vector"]
        if taps == 1:
            first, second, own = (array.reshape(x, x.shape[-2:]) for x in (f["l2i_conv1"], f["l2i_conv2"], kernel))
            branches = formulas.orepa_1x1(own, p.matmul(first, second), [vector[0], vector[1]])
            return array.reshape(formulas.total(branches), kernel.shape)

        def common(branch: Any, channels: int = i) -> Any:
            return _layout.common(branch, groups, channels, array)

        out, inner, filters = vector.shape[1], f["kxk_conv2"].shape[-2], OrepaParts.FILTERS
        first = common(f["kxk_idconv1"])[:, :, 0] + _layout.constant(self._identity, kernel, array)  # (G, I, t)
        second = common(f["kxk_conv2"], inner)  # (G, t, k, o)
        product = p.matmul(first, array.reshape(second, (groups, inner, taps * (out // groups))))
        depthwise = array.transpose(array.reshape(f["gconv_dw"], (taps, groups, i, filters)), (1, 2, 0, 3))
        pointwise = array.transpose(array.reshape(f["gconv_pw"], (i, filters, groups, out // groups)), (2, 0, 1, 3))
        point = f.get("conv_1x1")
        branches = formulas.orepa(
            weight=common(kernel),
            average=common(f["avg_conv"]),
            prior=common(f["prior_conv"]),
            product=array.reshape(product, (groups, i, taps, out // groups)),
            point=None if point is None else common(point),
            separable=(depthwise, pointwise),
            scales=[_layout.per_output(vector[n], groups, array) for n in range(vector.shape[0])],
            cosines=_layout.constant(self._cosines, kernel, array),
            centre=None if point is None else _layout.constant(self._centre, kernel, array),
            taps=taps,
            p=p,
        )
        return _layout.back(formulas.total(branches), kernel.shape, array)


def _cosines(out: int, size: tuple[int, ...], groups: int) -> np.ndarray:
    """``(G, 1, k, o)``; in single precision whatever the dtype, as the original stores them."""
    filters, taps = np.arange(float(out))[:, None], np.arange(float(math.prod(size)))
    values = formulas.cosines(filters, taps, size, np.cos).astype(np.float32)
    return values.reshape(groups, 1, out // groups, -1).swapaxes(2, 3)


def _kaiming(fan: int, a: float) -> Any:
    """The uniform initializer of torch's ``kaiming_uniform_`` with negative slope `a`."""
    bound = math.sqrt(6 / ((1 + a * a) * fan))
    return keras.initializers.RandomUniform(-bound, bound)


class _OREPAConv(OREPALayer, ComposedConv):
    """OREPA and OREPA_1x1 for `keras.layers.Conv1D` to `Conv3D`."""

    initializer = "kernel_initializer"

    @staticmethod
    def draws(taps: int, slope: float) -> Any:
        """Keras' names of `_kaiming`, for how many inputs there are is not known yet."""
        return "lecun_uniform" if slope else "he_uniform"


class _OREPADepthwise(OREPALayer, ComposedDepthwise):
    """OREPA for `keras.layers.DepthwiseConv1D` and `DepthwiseConv2D`: as of a convolution with a group per channel."""

    initializer = "depthwise_initializer"

    @staticmethod
    def draws(taps: int, slope: float) -> Any:
        """As of an output with one input."""
        return _kaiming(max(taps, 1), slope)


_registered = keras.saving.register_keras_serializable(package="foldconv")


@_registered
class OREPAConv1D(_OREPAConv, keras.layers.Conv1D):
    """``keras.layers.Conv1D`` that trains as an OREPA; arguments, shapes, errors and source as in `OREPAConv2D`.

    Example:
        >>> OREPAConv1D(8, 3, padding="causal")(keras.ops.zeros((1, 9, 4))).shape[1:] == (9, 8)
        True
    """

    plain = keras.layers.Conv1D


@_registered
class OREPAConv2D(_OREPAConv, keras.layers.Conv2D):
    """``keras.layers.Conv2D`` that trains as an OREPA (1×1: as an OREPA_1x1): its arguments, then by keyword

    Args:
        point: has the 1×1 branch; without it this is the convolution inside OREPA_VGG, which draws 1/√2 smaller.

    The default of ``kernel_initializer`` is the paper's. Regularizer and constraint of the kernel act on the origin
    branch.

    Shapes:
        input, output, the variables ``kernel`` (the origin branch) and ``bias`` as in the plain layer; g groups;
        ``avg_conv``, ``prior_conv``, ``conv_1x1``: ``(1, 1, in/g, filters)``; ``kxk_idconv1``: ``(1, 1, in/g, t)`` and
        ``kxk_conv2``: ``(*kernel_size, t/g, filters)``, ``t = in``, for more than four groups ``2·in``; ``gconv_dw``:
        ``(*kernel_size, in, 8)``, ``gconv_pw``: ``(1, 1, 8·in/g, filters)``; ``vector``: ``(branches, filters)``. 1×1:
        ``l2i_conv1`` ``(1, 1, in, t)`` and ``l2i_conv2`` ``(1, 1, t, filters)``, ``t = min(in, filters)``.

    Raises:
        UnsupportedError: for a 1×1 kernel with groups.

    Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3; initial values as in its code.

    Example:
        >>> layer = OREPAConv2D(8, 3, padding="same")
        >>> x = keras.random.normal((1, 6, 6, 4))
        >>> y = layer(x)
        >>> tuple(layer.vector.shape)
        (6, 8)
        >>> plain = layer.fold()
        >>> type(plain).__name__, tuple(plain.kernel.shape)
        ('Conv2D', (3, 3, 4, 8))
        >>> bool(keras.ops.max(keras.ops.abs(plain(x) - y)) < 1e-4)
        True
    """

    plain = keras.layers.Conv2D


@_registered
class OREPAConv3D(_OREPAConv, keras.layers.Conv3D):
    """``keras.layers.Conv3D`` that trains as an OREPA; arguments, shapes, errors and source as in `OREPAConv2D`.

    Example:
        >>> OREPAConv3D(3, 3)(keras.ops.zeros((1, 5, 5, 5, 2))).shape[1:] == (3, 3, 3, 3)
        True
    """

    plain = keras.layers.Conv3D


@_registered
class OREPADepthwiseConv1D(_OREPADepthwise, keras.layers.DepthwiseConv1D):
    """``keras.layers.DepthwiseConv1D`` that trains as an OREPA; the rest as in `OREPADepthwiseConv2D`.

    Example:
        >>> OREPADepthwiseConv1D(3)(keras.ops.zeros((1, 5, 2))).shape[1:] == (3, 2)
        True
    """

    plain = keras.layers.DepthwiseConv1D


@_registered
class OREPADepthwiseConv2D(_OREPADepthwise, keras.layers.DepthwiseConv2D):
    """``keras.layers.DepthwiseConv2D`` that trains as an OREPA: its arguments, then by keyword

    Args:
        point: as in `OREPAConv2D`.

    Shapes:
        the variables ``kernel`` and ``bias`` as in the plain layer; the rest as in an `OREPAConv2D` of
        ``filters = in · depth_multiplier`` and ``groups = in``.

    Raises:
        UnsupportedError: for a 1×1 kernel.

    Source: as in `OREPAConv2D`.

    Example:
        >>> layer = OREPADepthwiseConv2D(3, depth_multiplier=2)
        >>> layer(keras.ops.zeros((1, 5, 5, 4))).shape[1:] == (3, 3, 8)
        True
        >>> tuple(layer.vector.shape)
        (6, 8)
    """

    plain = keras.layers.DepthwiseConv2D


_LAYERS = (OREPAConv1D, OREPAConv2D, OREPAConv3D, OREPADepthwiseConv1D, OREPADepthwiseConv2D)


@register
@dataclasses.dataclass(frozen=True)
class OREPA(Method):
    """OREPA for `expand`.

    Args:
        point: the 1×1 branch of k×k kernels.
    """

    point: bool = True

    name: ClassVar[str] = "orepa"
    layers: ClassVar[dict[Any, Any]] = {c.plain: c for c in _LAYERS}

    def reason_against(self, layer: Any, norm: Any = None) -> str | None:
        """One tap with groups."""
        return OrepaParts.refusal(layer.kernel_size, getattr(layer, "groups", None))

    def preserve(self, layer: Any, norm: Any = None) -> None:
        """Only the origin branch keeps a scale: 1."""
        vector = np.zeros(layer.vector.shape)
        vector[0] = 1
        layer.vector.assign(vector)
