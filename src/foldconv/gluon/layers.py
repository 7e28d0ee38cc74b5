"""DO-Conv as a Gluon layer; see `foldconv.methods.doconv` for the method."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import formulas
from ..errors import FoldMismatchError, UnsupportedError
from . import _layout
from ._tree import copy_of, walk


@mx.init.register
class SurplusTaps(mx.init.Initializer):
    """Uniform in ``±1/√(in/g · k)``: what a plain convolution's taps are drawn from in `foldconv.DOConv2d`.

    Args:
        taps: k, the taps of the convolution's own kernel.

    Example:
        >>> layer = DOConv2D(2, 3, in_channels=1, depth_multiplier=10)
        >>> layer.initialize()
        >>> bool(layer.weight_extra.data().abs().max() <= 1 / 3)
        True
    """

    def __init__(self, taps: int):
        super().__init__(taps=taps)
        self.taps = taps

    def _init_weight(self, name: str, arr: Any) -> None:
        bound = (arr.shape[1] * self.taps) ** -0.5
        mx.random.uniform(-bound, bound, out=arr)


class DOConv2D(gluon.nn.Conv2D):
    """``gluon.nn.Conv2D`` that trains as a DO-Conv: its arguments in the same order, then by keyword

    Args:
        depth_multiplier: S, taps of D per position; an integer ≥ the taps of the kernel, by default equal to them.

    Shapes:
        input, output, ``weight`` and ``bias`` as in the plain layer; ``D``: ``(in, k, S)``, k the taps of the kernel,
        absent for k = 1; ``weight_extra``: ``(out, in/g, S - k)``, absent when S = k. As in the plain layer, ``in`` may
        be left to the first input. In layout NHWC (which MXNet convolves on GPUs only) ``weight`` has the plain layer's
        shape, ``(out, *kernel, in/g)``; ``D`` and ``weight_extra`` are the same in both.

    Parameters in float16 are composed in float32.

    Raises:
        UnsupportedError: for a `depth_multiplier` below the taps of the kernel, and in MXNet's NumPy mode.

    Source: Cao et al., "DO-Conv", TIP 2022, eq. 4.

    Example:
        >>> layer = DOConv2D(8, 3, padding=(1, 1))
        >>> layer.initialize()
        >>> x = mx.nd.random.normal(shape=(1, 4, 6, 6))
        >>> y = layer(x)
        >>> layer.D.shape, layer.weight.shape
        ((4, 9, 9), (8, 4, 3, 3))
        >>> bool((layer.fold()(x) - y).abs().max() < 1e-6)
        True
    """

    D: Any = None
    weight_extra: Any = None

    def __init__(self, *args: Any, depth_multiplier: int | None = None, **kwargs: Any):
        if mx.util.is_np_array():
            raise UnsupportedError(
                "DOConv2D: composes mx.nd arrays, MXNet is in NumPy mode; call mx.npx.reset_np() first"
            )
        super().__init__(*args, **kwargs)
        self._over_parameterize(depth_multiplier)

    def _over_parameterize(self, depth_multiplier: int | None) -> None:
        """Add D and the surplus taps to what is a plain convolution otherwise.

        Raises:
            UnsupportedError: as the class says; nothing has changed then.
        """
        geometry, taps = self._kwargs, self._taps
        multiplier = self.depth_multiplier = formulas.doconv_multiplier(depth_multiplier, geometry["kernel"])
        if taps == 1:
            return
        out, per_group = self.weight.shape[0], self._inputs_per_group
        more = {"dtype": self.weight.dtype, "allow_deferred_init": True}
        channels = per_group * geometry["num_group"]
        self.D = self.params.get("D", shape=(channels, taps, multiplier), init="zeros", **more)
        if multiplier > taps:
            shape = (out, per_group, multiplier - taps)
            self.weight_extra = self.params.get("weight_extra", shape=shape, init=SurplusTaps(taps), **more)

    @property
    def _taps(self) -> int:
        height, width = self._kwargs["kernel"]
        return height * width

    @property
    def _channels_last(self) -> bool:
        return self._kwargs["layout"] == "NHWC"

    @property
    def _inputs_per_group(self) -> int:
        """in/g; 0 while the first input has not told."""
        return self.weight.shape[3 if self._channels_last else 1]

    def hybrid_forward(
        self, F: Any, x: Any, weight: Any, bias: Any = None, D: Any = None, weight_extra: Any = None
    ) -> Any:
        """Compose (eq. 4), then convolve as the plain layer does."""
        if D is not None:
            geometry = self._kwargs
            weight = _layout.doconv(
                F,
                weight,
                D,
                weight_extra,
                tuple(geometry["kernel"]),
                self.depth_multiplier,
                geometry["num_group"],
                channels_last=self._channels_last,
                half=self.weight.dtype in ("float16", np.float16),
            )
        return super().hybrid_forward(F, x, weight, bias)

    def fold(self) -> gluon.nn.Conv2D:
        """The plain layer that computes the same, with parameters of its own; composed in float64, cast last.

        Raises:
            FoldMismatchError: when the composed kernel holds NaN or infinity.
        """
        return fold(self)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, depth_multiplier={self.depth_multiplier})"


def fold(block: Any) -> Any:
    """A copy of the block with every `DOConv2D` as the plain convolution that computes the same.

    Kernels are composed in float64 and cast last. Layers whose shapes still wait for the first input become plain ones
    that wait.

    Args:
        block: any Block, also a single `DOConv2D`; one without them comes back as a copy.

    Raises:
        FoldMismatchError: naming the layer, when a kernel holds NaN or infinity.
        UnsupportedError: for a subclass of `DOConv2D`, and for a weight that two layers use with different D.
        In every case `block` is as it was.

    Example:
        >>> net = gluon.nn.HybridSequential()
        >>> net.add(DOConv2D(4, 3, in_channels=2))
        >>> net.initialize()
        >>> fold(net)[0]
        Conv2D(2 -> 4, kernel_size=(3, 3), stride=(1, 1))
    """
    work = copy_of(block)
    layers = [layer for layer in walk(work) if isinstance(layer, DOConv2D)]
    users: dict[int, Any] = {}
    for layer in walk(work):
        for parameter in layer._reg_params.values():
            D = getattr(layer, "D", None) if isinstance(layer, DOConv2D) else None
            users.setdefault(id(parameter), set()).add(id(D))
    composed = set()
    for layer in layers:
        if type(layer) is not DOConv2D:
            raise UnsupportedError(f"{layer.name}: expected a DOConv2D, found its subclass {type(layer).__name__}")
        if len(users[id(layer.weight)]) > 1:
            raise UnsupportedError(
                f"{layer.name}: its weight is also used without this layer's D, so no one kernel fits; untie it first"
            )
        if layer.D is not None and layer.D._data is not None and id(layer.weight) not in composed:
            layer.weight.set_data(_kernel(layer))
            composed.add(id(layer.weight))
    for layer in layers:
        for part in ("D", "weight_extra"):
            parameter = layer._reg_params.pop(part, None)
            if parameter is not None:
                delattr(layer, part)
                layer.params._params.pop(parameter.name, None)
        del layer.depth_multiplier
        layer.__class__ = gluon.nn.Conv2D
    return work


def _kernel(layer: DOConv2D) -> np.ndarray:
    """The composed kernel in the weight's dtype."""
    parameters: list[Any] = [layer.weight, layer.D, layer.weight_extra]
    weight, D, extra = (None if p is None else p.data(p.list_ctx()[0]).asnumpy() for p in parameters)
    assert weight is not None, "whoever asks has seen that it has values"
    assert D is not None, "whoever asks has seen that it has values"
    if layer._channels_last:
        weight = weight.transpose(0, 3, 1, 2)
    with np.errstate(over="ignore"):
        kernel = _layout.doconv_in_float64(weight, D, extra, layer._kwargs["num_group"]).astype(weight.dtype)
    if layer._channels_last:
        kernel = kernel.transpose(0, 2, 3, 1)
    bad = int((~np.isfinite(kernel)).sum())
    if bad:
        raise FoldMismatchError(
            f"{layer.name}: expected a finite kernel, found {bad} of {kernel.size} not finite in {kernel.dtype}; "
            "the layer's parameters hold NaN or infinity, or need float32"
        )
    return kernel
