"""Layers whose kernel is composed while training: only how the kernel is made differs from Keras' own."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import sys
from typing import Any

import numpy as np

import keras

from ..errors import UnsupportedError
from .foldable import FoldableConv, FoldableDepthwise, FoldableLayer, float64

_SPECTRAL: Any = keras.layers.SpectralNormalization


class ComposedLayer(FoldableLayer):
    """A layer with more variables than ``kernel`` that its kernel is composed from."""

    def composed(self, kernel: Any, factors: dict[str, Any], array: Any) -> Any:
        """The kernel, in the shape of `kernel`, in operations of `array`: ``keras.ops`` or ``numpy``."""
        raise NotImplementedError

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Keras' own, but what the kernel is composed from stays in its own precision until it is composed."""
        if kwargs.get("name") in ("kernel", *self.factors):
            kwargs["autocast"] = False
        return super().add_weight(*args, **kwargs)  # pyright: ignore

    def compose(self: Any, kernel: Any) -> Any:
        """The kernel to convolve with, composed in float32 or better, in the compute dtype.

        Raises:
            UnsupportedError: for ``SpectralNormalization``, which would write to it.
        """
        caller = sys._getframe(2)  # whoever asks for `kernel`
        if caller.f_code.co_name == "build" and isinstance(caller.f_locals.get("self"), _SPECTRAL):
            raise UnsupportedError(
                f"{self.name}: SpectralNormalization writes to a kernel, and this one is composed from several "
                f"variables; wrap a {self.plain.__name__}, or fold first"
            )
        factors = self.present()
        if factors:
            # Not Keras' result_type, which on two of its backends says float32 of float64.
            precise = "float64" if self.variable_dtype == "float64" else "float32"
            cast = {name: keras.ops.cast(factor, precise) for name, factor in factors.items()}
            kernel = self.composed(keras.ops.cast(kernel, precise), cast, keras.ops)
        return keras.ops.cast(kernel, self.compute_dtype)

    def folded(self: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """The composed kernel, in the shape of ``kernel``, and the bias or None, computed in float64."""
        kernel, factors = float64(self.own_kernel), self.present()
        if factors:
            kernel = self.composed(kernel, {name: float64(factor) for name, factor in factors.items()}, np)
        return kernel, float64(self.bias) if self.use_bias else None

    def get_config(self) -> dict[str, Any]:
        """Keras' own config and the method's options."""
        return {**super().get_config(), **{name: getattr(self, name) for name in self.options}}  # pyright: ignore


class ComposedConv(ComposedLayer, FoldableConv):
    """For `keras.layers.Conv1D` to `Conv3D`."""

    @property
    def kernel(self) -> Any:
        """The composed kernel, in the compute dtype; the variable that is trained is among ``weights``."""
        return self.compose(self.own_kernel)


class ComposedDepthwise(ComposedLayer, FoldableDepthwise):
    """For `keras.layers.DepthwiseConv1D` and `DepthwiseConv2D`."""

    @property
    def kernel(self) -> Any:
        """The composed kernel, in the compute dtype; the variable that is trained is among ``weights``."""
        return self.compose(self._kernel)

    @kernel.setter
    def kernel(self, variable: Any) -> None:
        self._kernel = variable  # Keras' build assigns it
