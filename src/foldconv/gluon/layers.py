"""DO-Conv as a Gluon layer; see `foldconv.methods.doconv` for the method."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np
from mxnet import gluon

from .. import formulas
from ..errors import UnsupportedError
from . import _layout


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
        from .network import fold

        return fold(self)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, depth_multiplier={self.depth_multiplier})"
