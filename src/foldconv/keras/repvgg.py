"""RepVGG (Ding et al., CVPR 2021) for Keras: branches with norms of their own beside the convolution.

    y = BN(W_k * x) + BN(W_1 * x) + BN(x)

The 1×1 branch and the identity, which is there where input and output have one shape, stand at the tap that the folded
kernel has in its middle (`foldconv.formulas.centre_tap`): under ``padding="same"`` with a stride Keras pads the end
before the beginning, so the place depends on the input's size. The norms use the batch while training, so the branches
run on feature maps; the function in evaluation mode is one convolution, and that is what folds.

`expand` moves the BatchNormalization that alone follows a convolution into the main branch and keeps its place by a
`NormPlace`; `fold` puts a norm back there, so that the weights fit the original. A convolution without such a norm has
none in its main branch; its bias takes the shift of the others.
"""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any, ClassVar

import numpy as np

import keras

from .. import formulas
from .._arguments import expect
from ..errors import UnsupportedError
from . import _layout
from ._registry import Method, register
from .foldable import FoldableConv, FoldableDepthwise, FoldableLayer, float64

_SHARED = ("axis", "momentum", "epsilon", "synchronized", "dtype")  # what the branches' norms take over


class RepVGGLayer(FoldableLayer):
    """What all RepVGG layers of Keras share.

    Attributes:
        norm: of the main branch, a ``BatchNormalization``, or None.
        point_kernel: of the 1×1 branch, ``(1, ..., *kernel.shape[-2:])``.
        point_norm: of the 1×1 branch.
        identity_norm: of the identity, or None where there is none.
    """

    method = "repvgg"
    options = ("norm",)
    factors = ("point_kernel",)
    norm: Any
    point_kernel: Any = None

    def __init__(self: Any, *args: Any, norm: Any = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        kinds = (bool, dict, type(None), keras.layers.BatchNormalization)
        expect("norm", norm, kinds, "True, a BatchNormalization, its config, or None")
        if isinstance(norm, keras.layers.BatchNormalization):
            norm = norm.get_config()
        axis = 1 if self.data_format == "channels_first" else -1
        given = norm if isinstance(norm, dict) else {"axis": axis, "dtype": self.dtype_policy}
        self.norm = keras.layers.BatchNormalization.from_config({**given, "name": "norm"}) if norm else None
        self._shared = {key: given[key] for key in _SHARED if key in given}
        self.point_norm = self._new_norm("point_norm")
        self.identity_norm = None  # until the channels are known

    def _new_norm(self, name: str) -> Any:
        return keras.layers.BatchNormalization(**self._shared, name=name)

    @property
    def kernel(self: Any) -> Any:
        """The main branch's kernel.

        Raises:
            UnsupportedError: within the ``call`` of another layer, for the folded kernel would be another one.
        """
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_locals.get("self") is not self:
            reader = frame.f_locals.get("self")
            if frame.f_code.co_name == "call" and isinstance(reader, keras.Layer):
                raise UnsupportedError(
                    f"{self.name}: the call of {type(reader).__name__} reads its kernel: expected one "
                    "that folding keeps, received a RepVGG of several; exclude it, or expand it with doconv or orepa"
                )
            frame = frame.f_back
        return self.own_kernel

    @kernel.setter
    def kernel(self: Any, variable: Any) -> None:
        self._kernel = variable  # Keras' build of a depthwise layer assigns it

    @property
    def norms(self) -> list[Any]:
        """The norms that there are: of the main branch, of the 1×1, of the identity."""
        own = [self.norm, self.point_norm, self.identity_norm]  # pyright: ignore
        return [norm for norm in own if norm is not None]

    def add_factors(self: Any, input_shape: Any) -> None:
        """Make the 1×1 kernel and the norms' variables."""
        shape = (*(1,) * len(self.kernel_size), *self._kernel.shape[-2:])
        regularizer = self.kernel_regularizer if hasattr(self, "kernel_regularizer") else self.depthwise_regularizer
        self.add_factor("point_kernel", shape, "glorot_uniform", regularizer=regularizer)
        output = self.compute_output_shape(input_shape)
        axis = 1 if self.data_format == "channels_first" else -1
        if self._is_aligned() and input_shape[axis] == output[axis]:
            self.identity_norm = self._new_norm("identity_norm")
        for norm in self.norms:
            norm.build(output)
            # A norm that is frozen keeps its statistics; it does not ask the layer that it is in.
            norm.trainable = norm.trainable and self.trainable

    def call(self: Any, inputs: Any, training: bool | None = None) -> Any:
        """The sum of the branches, then the activation."""
        y = self.convolved(inputs)
        if self.norm is not None:
            y = self.norm(y, training=training)
        middle = self._middle(inputs)
        y = y + self.point_norm(self.convolve(middle, self.point_kernel), training=training)
        if self.identity_norm is not None:
            y = y + self.identity_norm(inputs, training=training)
        return y if self.activation is None else self.activation(y)

    def _starts(self: Any, sizes: Any) -> list[Any]:
        """Per dimension the position of the middle tap of the first output; `sizes` are the input's.

        Negative where that lies in the padding, a tensor where it depends on a size not known yet.
        """
        starts = []
        middle = formulas.middle(self.kernel_size)
        each = zip(self.kernel_size, middle, self.dilation_rate, self.strides, self.reach(), sizes)
        for k, m, d, s, reach, size in each:
            start = m * d
            if self.padding == "causal":
                start -= reach
            elif self.padding == "same" and s == 1:
                start -= reach // 2
            elif self.padding == "same":  # Keras has no dilation beside a stride
                rest = size % s
                if isinstance(size, int):
                    start -= max(k - (rest or s), 0) // 2
                else:
                    start -= keras.ops.maximum(k - keras.ops.where(rest == 0, s, rest), 0) // 2
            starts.append(start)
        return starts

    def _middle(self: Any, x: Any) -> Any:
        """What the middle tap reads: the 1×1 branch is a product with it."""
        first = 2 if self.data_format == "channels_first" else 1
        pads, index = [(0, 0)] * len(x.shape), [slice(None)] * len(x.shape)
        starts = self._starts(keras.ops.shape(x)[first : first + len(self.kernel_size)])
        for axis, (start, s, reach) in enumerate(zip(starts, self.strides, self.reach()), first):
            stop = None
            if self.padding == "valid":
                stop = start - reach or None
            elif isinstance(start, int) and start < 0:
                pads[axis], stop, start = (-start, 0), start, 0
            index[axis] = slice(start, stop, s)
        if any(before for before, _ in pads):
            x = keras.ops.pad(x, pads)
        return x[tuple(index)]

    def _is_aligned(self: Any) -> bool:
        """Does the middle tap of each output read the input at the output's place?"""
        return self.padding != "valid" and set(self.strides) == {1} and not any(self._starts(self.kernel_size))

    def folded(self: Any) -> tuple[np.ndarray, np.ndarray]:
        """The kernel and the bias of the function in evaluation mode, computed in float64."""
        (groups, i), kernel = self.decomposition, float64(self.own_kernel)
        out = math.prod(kernel.shape[-2:]) // i
        bias = float64(self.bias) if self.use_bias else np.zeros(out)
        scales, shift = [], np.zeros(out)
        for norm in (self.norm, self.point_norm, self.identity_norm):
            scale, own = (np.ones(out), 0.0) if norm is None else _scale_and_shift(norm)
            if norm is self.norm:
                own = own + scale * bias
            if norm is not None or not scales:
                shift = shift + own
            scales.append(_layout.per_output(scale, groups, np))
        composed = formulas.repvgg(
            weight=_layout.common(kernel, groups, i, np),
            point=_layout.common(float64(self.point_kernel), groups, i, np),
            identity=None if self.identity_norm is None else np.eye(i).reshape(1, i, 1, i),
            scales=scales,
            centre=_layout.at_centre(self.kernel_size),
        )
        return _layout.back(composed, kernel.shape, np), shift

    def fold_before(self: Any, config: dict[str, Any]) -> tuple[Any, Any]:
        """The plain layer and the BatchNormalization of a config that compute together what this layer does.

        The norm's statistics become those of a norm that only shifts.
        """
        self.check_built()
        kernel, shift = self.folded()
        norm = keras.layers.BatchNormalization.from_config(config)
        norm.build(self.compute_output_shape(self.get_build_config()["input_shape"]))
        for variable in norm.weights:
            variable.assign(
                np.full(variable.shape, {"gamma": 1, "moving_variance": 1 - norm.epsilon}.get(variable.name, 0))
            )
        # The variance was rounded to the norm's type: what its scale really is, the kernel makes up for.
        scale, _ = _scale_and_shift(norm)
        if norm.center:
            norm.beta.assign(shift)
        else:
            norm.moving_mean.assign(-shift / scale)
        norm.trainable = self.norm.trainable
        per_channel = 1 / scale if hasattr(self, "groups") else np.reshape(1 / scale, kernel.shape[-2:])
        return self.realize(kernel * per_channel, np.zeros(len(shift)) if self.use_bias else None), norm

    def get_config(self) -> dict[str, Any]:
        """Keras' own config and the config of the main branch's norm, or None."""
        norm = None if self.norm is None else self.norm.get_config()
        return {**super().get_config(), "norm": norm}  # pyright: ignore


def _scale_and_shift(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """A norm's evaluation function."""
    gamma, beta = (None if v is None else float64(v) for v in (norm.gamma, norm.beta))
    return formulas.norm(gamma, beta, float64(norm.moving_mean), float64(norm.moving_variance), norm.epsilon)


_registered = keras.saving.register_keras_serializable(package="foldconv")


@_registered
class NormPlace(keras.layers.Layer):
    """Where a BatchNormalization was before a RepVGG layer took it in: passes on what it gets.

    Args:
        norm: the config of the norm that `foldconv.keras.fold` puts back here.

    Shapes:
        the output is the input.

    Example:
        >>> place = NormPlace(keras.layers.BatchNormalization(name="bn").get_config(), name="bn")
        >>> tuple(place(keras.ops.zeros((1, 5, 5, 4))).shape)
        (1, 5, 5, 4)
    """

    def __init__(self, norm: dict[str, Any], **kwargs: Any):
        super().__init__(**kwargs)
        self.config = dict(norm)
        self.supports_masking = True

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """The input; the other arguments are those that the norm was called with."""
        return inputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Keras' own config and the norm's."""
        return {**super().get_config(), "norm": dict(self.config)}


class _RepVGGConv(RepVGGLayer, FoldableConv):
    """RepVGG for `keras.layers.Conv1D` to `Conv3D`."""


class _RepVGGDepthwise(RepVGGLayer, FoldableDepthwise):
    """RepVGG for `keras.layers.DepthwiseConv1D` and `DepthwiseConv2D`."""


@_registered
class RepVGGConv1D(_RepVGGConv, keras.layers.Conv1D):
    """``keras.layers.Conv1D`` that trains as a RepVGG block; arguments, shapes, errors and source as in `RepVGGConv2D`.

    Example:
        >>> RepVGGConv1D(8, 3, padding="causal")(keras.ops.zeros((1, 9, 4))).shape[1:] == (9, 8)
        True
    """

    plain = keras.layers.Conv1D


@_registered
class RepVGGConv2D(_RepVGGConv, keras.layers.Conv2D):
    """``keras.layers.Conv2D`` that trains as a RepVGG block: its arguments, then by keyword

    Args:
        norm: the main branch's norm: True (Keras' defaults), a ``BatchNormalization`` or its config, or None for none.
            The other branches' norms take over its momentum and epsilon.

    The activation comes after the sum. ``kernel_regularizer`` acts on both kernels. Constructed directly all norms
    start with gamma one, as in the paper; `foldconv.keras.expand` starts the new ones with zero, which adds nothing.

    Shapes:
        input, output, the variables ``kernel`` and ``bias`` as in the plain layer; ``point_kernel``:
        ``(1, 1, in/groups, filters)``; ``norm``, ``point_norm``, ``identity_norm``: four of ``(filters,)`` each.

    Returns from `fold`: a ``Conv2D`` with bias.

    Raises:
        UnsupportedError: from `fold`, before there are weights.

    Source: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, section 3.

    Example:
        >>> layer = RepVGGConv2D(4, 3, padding="same", activation="relu")
        >>> x = keras.random.normal((1, 6, 6, 4))
        >>> y = layer(x)
        >>> [norm.name for norm in layer.norms]
        ['norm', 'point_norm', 'identity_norm']
        >>> plain = layer.fold()
        >>> type(plain).__name__, tuple(plain.kernel.shape)
        ('Conv2D', (3, 3, 4, 4))
        >>> bool(keras.ops.max(keras.ops.abs(plain(x) - y)) < 1e-4)
        True
    """

    plain = keras.layers.Conv2D


@_registered
class RepVGGConv3D(_RepVGGConv, keras.layers.Conv3D):
    """``keras.layers.Conv3D`` that trains as a RepVGG block; arguments, shapes, errors and source as in `RepVGGConv2D`.

    Example:
        >>> RepVGGConv3D(3, 3)(keras.ops.zeros((1, 5, 5, 5, 2))).shape[1:] == (3, 3, 3, 3)
        True
    """

    plain = keras.layers.Conv3D


@_registered
class RepVGGDepthwiseConv1D(_RepVGGDepthwise, keras.layers.DepthwiseConv1D):
    """``keras.layers.DepthwiseConv1D`` that trains as a RepVGG block; the rest as in `RepVGGDepthwiseConv2D`.

    Example:
        >>> RepVGGDepthwiseConv1D(3)(keras.ops.zeros((1, 5, 2))).shape[1:] == (3, 2)
        True
    """

    plain = keras.layers.DepthwiseConv1D


@_registered
class RepVGGDepthwiseConv2D(_RepVGGDepthwise, keras.layers.DepthwiseConv2D):
    """``keras.layers.DepthwiseConv2D`` that trains as a RepVGG block: its arguments, then `norm` as in `RepVGGConv2D`.

    Shapes:
        as in `RepVGGConv2D`; ``point_kernel``: ``(1, 1, in, depth_multiplier)``.

    Raises:
        UnsupportedError: from `fold`, before there are weights.

    Source: as in `RepVGGConv2D`.

    Example:
        >>> layer = RepVGGDepthwiseConv2D(3, padding="same")
        >>> layer(keras.ops.zeros((1, 5, 5, 4))).shape[1:] == (5, 5, 4)
        True
        >>> len(layer.norms)
        3
    """

    plain = keras.layers.DepthwiseConv2D


_LAYERS = (RepVGGConv1D, RepVGGConv2D, RepVGGConv3D, RepVGGDepthwiseConv1D, RepVGGDepthwiseConv2D)


@register
@dataclasses.dataclass(frozen=True)
class RepVGG(Method):
    """RepVGG for `expand`; it has no options."""

    name: ClassVar[str] = "repvgg"
    layers: ClassVar[dict[Any, Any]] = {c.plain: c for c in _LAYERS}
    takes_norm: ClassVar[bool] = True

    def reason_against(self, layer: Any, norm: Any = None) -> str | None:
        """A shift needs a place after folding, and a 1×1 kernel gains nothing from a second one."""
        if math.prod(layer.kernel_size) == 1:
            return formulas.POINT_BESIDE_ONE_TAP
        if norm is None and not layer.use_bias:
            return "neither a norm that follows it alone nor a bias is there to take the branches' shift"
        if norm is not None and norm.trainable and not layer.trainable:
            return "it is frozen, and the norm that follows it is not"
        return None

    def options_for(self, layer: Any, norm: Any = None) -> dict[str, Any]:
        """The norm that is taken in."""
        return {"norm": None if norm is None else norm.get_config()}

    def preserve(self, layer: Any, norm: Any = None) -> None:
        """The main branch gets the norm's own state; the others' norms get gamma zero."""
        if norm is not None:
            layer.norm.set_weights([np.array(value) for value in norm.get_weights()])
            layer.norm.trainable = norm.trainable
        for new in (layer.point_norm, layer.identity_norm):
            if new is not None:
                new.gamma.assign(np.zeros(new.gamma.shape))
