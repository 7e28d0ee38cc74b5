"""Layers whose kernel is composed while training: only how the kernel is made differs from Keras' own."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

import keras

from .foldable import FoldableLayer, float64


class ComposedLayer(FoldableLayer):
    """A layer with more variables than ``kernel`` that its kernel is composed from.

    A subclass names them in `factors` and has an attribute of each name, None where there is no such variable.
    """

    factors: ClassVar[tuple[str, ...]] = ()

    def add_factors(self) -> None:
        """Make the variables besides Keras' own; called at the end of ``build``."""
        raise NotImplementedError

    def composed(self, kernel: Any, factors: dict[str, Any], array: Any) -> Any:
        """The kernel, in the shape of `kernel`, in operations of `array`: ``keras.ops`` or ``numpy``."""
        raise NotImplementedError

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Keras' own, but what the kernel is composed from stays in its own precision until it is composed."""
        if kwargs.get("name") in ("kernel", *self.factors):
            kwargs["autocast"] = False
        return super().add_weight(*args, **kwargs)  # pyright: ignore

    def add_factor(self: Any, name: str, shape: tuple[int, ...], initializer: Any) -> Any:
        """Make one of `factors`."""
        variable = self.add_weight(name=name, shape=shape, initializer=initializer, dtype=self.variable_dtype)
        setattr(self, name, variable)
        return variable

    def present(self) -> dict[str, Any]:
        """Those of `factors` that there are, by name."""
        own = {name: getattr(self, name) for name in self.factors}
        return {name: variable for name, variable in own.items() if variable is not None}

    def compose(self: Any, kernel: Any) -> Any:
        """The kernel to convolve with, composed in float32 or better, in the compute dtype."""
        factors = self.present()
        if factors:
            precise = keras.backend.result_type(self.variable_dtype, "float32")
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


class ComposedConv(ComposedLayer):
    """For `keras.layers.Conv1D` to `Conv3D`, whose kernel may have a part by LoRA."""

    def build(self: Any, input_shape: Any) -> None:
        """Make Keras' own weights, then what else the kernel is composed from, then LoRA's."""
        # Keras closes the layer to new weights where it makes LoRA's.
        rank, self.lora_rank = self.lora_rank, None
        super().build(input_shape)  # pyright: ignore
        self.add_factors()
        if rank:
            self.enable_lora(rank, lora_alpha=self.lora_alpha)

    @property
    def own_kernel(self) -> Any:
        """Keras' own kernel, before it is composed; with LoRA's part where that is enabled."""
        return super().kernel  # pyright: ignore

    @property
    def kernel(self) -> Any:
        """The composed kernel, in the compute dtype; the variable that is trained is among ``weights``."""
        return self.compose(self.own_kernel)

    def save_own_variables(self: Any, store: Any) -> None:
        """Keras' own keys, and the other variables by name; as in Keras, LoRA is merged into the kernel."""
        if not self.built:
            return
        store["0"] = self.own_kernel
        if self.use_bias:
            store["1"] = self.bias
        for name, factor in self.present().items():
            store[name] = factor

    def load_own_variables(self: Any, store: Any) -> None:
        """The inverse of `save_own_variables`."""
        super().load_own_variables(store)  # pyright: ignore
        if self.built:
            for name, factor in self.present().items():
                factor.assign(store[name])


class ComposedDepthwise(ComposedLayer):
    """For `keras.layers.DepthwiseConv1D` and `DepthwiseConv2D`."""

    def build(self, input_shape: Any) -> None:
        """Make Keras' own weights, then what else the kernel is composed from."""
        super().build(input_shape)  # pyright: ignore
        self.add_factors()

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
