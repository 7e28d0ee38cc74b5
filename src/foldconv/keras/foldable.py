"""What all layers of `foldconv.keras` share: more variables than Keras' own, and that they fold."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import functools
from typing import Any, ClassVar

import numpy as np

import keras

from ..errors import UnsupportedError


class FoldableLayer:
    """A Keras layer that folds; a mixin before Keras' own layer.

    A method names its variables in `factors` and has an attribute of each name, None where there is no such variable.

    Attributes:
        plain: the Keras layer that it folds to.
        method: the name that `foldconv.keras.expand` knows it by.
        options: the arguments that `plain` lacks.
        factors: the variables that `plain` lacks.
        no_decay: those of them that weight decay leaves alone.
    """

    plain: ClassVar[Any]
    method: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    factors: ClassVar[tuple[str, ...]] = ()
    no_decay: ClassVar[frozenset[str]] = frozenset()

    def call(self: Any, inputs: Any) -> Any:
        """As Keras' own layer."""
        if self.data_format == "channels_last" or not self.use_bias:
            return super().call(inputs)  # pyright: ignore
        y = self.convolved(inputs)
        return y if self.activation is None else self.activation(y)

    def convolved(self: Any, inputs: Any) -> Any:
        """The convolution and the bias, without `keras.ops.add`: see `add_is_wrong`."""
        y = self.convolve(inputs, self.kernel, self.strides, self.padding, self.dilation_rate)
        if self.use_bias:
            shape = (-1, *(1,) * len(self.kernel_size)) if self.data_format == "channels_first" else (-1,)
            y = y + keras.ops.reshape(self.bias, shape)
        return y

    def convolve(self: Any, x: Any, kernel: Any, strides: Any = 1, padding: str = "valid", dilation: Any = 1) -> Any:
        """A convolution with a kernel of this layer's kind."""
        if padding == "causal":
            before = [(0, 0), (0, 0), (self.reach()[0], 0)]
            x = keras.ops.pad(x, before if self.data_format == "channels_first" else [before[0], before[2], before[1]])
            padding = "valid"
        convolve = keras.ops.conv if hasattr(self, "groups") else keras.ops.depthwise_conv
        own = {"data_format": self.data_format, "dilation_rate": dilation}
        return convolve(x, kernel, strides=strides, padding=padding, **own)

    def reach(self: Any) -> list[int]:
        """How far each dimension's last tap is from its first."""
        return [(k - 1) * d for k, d in zip(self.kernel_size, self.dilation_rate)]

    def add_factors(self, input_shape: Any) -> None:
        """Make the variables besides Keras' own; called in ``build`` after those are made."""
        raise NotImplementedError

    def add_factor(self: Any, name: str, shape: tuple[int, ...], initializer: Any, **more: Any) -> Any:
        """Make one of `factors`."""
        variable = self.add_weight(name=name, shape=shape, initializer=initializer, dtype=self.variable_dtype, **more)
        setattr(self, name, variable)
        return variable

    def present(self) -> dict[str, Any]:
        """Those of `factors` that there are, by name."""
        own = {name: getattr(self, name) for name in self.factors}
        return {name: variable for name, variable in own.items() if variable is not None}

    def folded(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The kernel, in the plain layer's shape, and the bias or None, computed in float64."""
        raise NotImplementedError

    def fold(self: Any) -> Any:
        """The plain Keras layer of the same name that computes the same in evaluation mode: built, with its weights.

        LoRA weights are merged into the kernel.

        Raises:
            UnsupportedError: for a layer that has no weights yet.
        """
        self.check_built()
        kernel, bias = self.folded()
        return self.realize(kernel, bias)

    def check_built(self: Any) -> None:
        """Raise an UnsupportedError for a layer that has no weights yet."""
        if not self.built:
            raise UnsupportedError(f"{self.name}: it has no weights yet; call it, or build it, before folding")

    def realize(self: Any, kernel: np.ndarray, bias: np.ndarray | None) -> Any:
        """A plain layer with this layer's arguments and these weights.

        Raises:
            UnsupportedError: for a bias that the plain layer would add along the wrong axis (`add_is_wrong`).
        """
        if bias is not None and bias.any() and self.data_format == "channels_first" and add_is_wrong():
            # A shared layer is built for the first of its calls.
            shapes = [self.compute_output_shape(self.get_build_config()["input_shape"])]
            shapes += [tensor.shape for node in self._inbound_nodes for tensor in node.output_tensors]
            width = next((shape[-1] for shape in shapes if shape[-1] in (None, len(bias))), 0)
            if width != 0:
                keras_here = f"Keras {keras.__version__} on {keras.backend.backend()}"
                raise UnsupportedError(
                    f"{self.name}: {keras_here} adds a channels_first bias along the wrong axis where the output is as "
                    f"wide as it has channels: expected a width other than {len(bias)}, received {width}; fold it with "
                    "KERAS_BACKEND=jax or torch, or use channels_last"
                )
        config = self.get_config()
        for name in (*self.options, "lora_rank", "lora_alpha"):
            config.pop(name, None)
        layer = self.plain.from_config({**config, "use_bias": bias is not None})
        layer.build_from_config(self.get_build_config())
        layer.set_weights([kernel] if bias is None else [kernel, bias])
        layer.trainable = self.trainable
        return layer

    @property
    def decomposition(self: Any) -> tuple[int, int]:
        """Groups of the convolution, and input channels of one."""
        kernel = self._kernel
        return (self.groups, kernel.shape[-2]) if hasattr(self, "groups") else (kernel.shape[-2], 1)


class FoldableConv(FoldableLayer):
    """For `keras.layers.Conv1D` to `Conv3D`, whose kernel may have a part by LoRA."""

    def build(self: Any, input_shape: Any) -> None:
        """Make Keras' own weights, then the method's, then LoRA's."""
        # Keras closes the layer to new weights where it makes LoRA's.
        rank, self.lora_rank = self.lora_rank, None
        super().build(input_shape)  # pyright: ignore
        self.add_factors(input_shape)
        if rank:
            self.enable_lora(rank, lora_alpha=self.lora_alpha)

    @property
    def own_kernel(self) -> Any:
        """Keras' own kernel, with LoRA's part where that is enabled."""
        return super().kernel  # pyright: ignore

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
            if self.lora_enabled:  # Keras makes both of LoRA's factors zero, where none of them has a gradient
                a = self.lora_kernel_a
                a.assign(keras.initializers.HeUniform()(a.shape, a.dtype))


class FoldableDepthwise(FoldableLayer):
    """For `keras.layers.DepthwiseConv1D` and `DepthwiseConv2D`."""

    def build(self, input_shape: Any) -> None:
        """Make Keras' own weights, then the method's."""
        super().build(input_shape)  # pyright: ignore
        self.add_factors(input_shape)

    @property
    def own_kernel(self) -> Any:
        """Keras' own kernel."""
        return self._kernel

    @property
    def kernel(self) -> Any:
        """Keras' own kernel."""
        return self._kernel

    @kernel.setter
    def kernel(self, variable: Any) -> None:
        self._kernel = variable  # Keras' build assigns it


@functools.cache
def add_is_wrong() -> bool:
    """Does `keras.ops.add` add (1, C, 1) to (N, C, C) along the last axis? Keras 3.15 on TensorFlow does."""
    added = keras.ops.add(
        keras.ops.zeros((1, 2, 2)), keras.ops.reshape(keras.ops.arange(2, dtype="float32"), (1, 2, 1))
    )
    return bool(keras.ops.convert_to_numpy(added)[0, 0, 1])


def float64(variable: Any) -> np.ndarray:
    """A variable's value in NumPy."""
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)
