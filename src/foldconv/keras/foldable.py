"""What all layers of `foldconv.keras` share: they fold, and say what of them does not decay."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

import keras

from ..errors import UnsupportedError


class FoldableLayer:
    """A Keras layer that folds; a mixin before Keras' own layer.

    Attributes:
        plain: the Keras layer that it folds to.
        method: the name that `foldconv.keras.expand` knows it by.
        options: the arguments that `plain` lacks.
        no_decay: variables, by name, that weight decay leaves alone.
    """

    plain: ClassVar[Any]
    method: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    no_decay: ClassVar[frozenset[str]] = frozenset()

    def folded(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The kernel, in the plain layer's shape, and the bias or None, computed in float64."""
        raise NotImplementedError

    def fold(self: Any) -> Any:
        """The plain Keras layer of the same name that computes the same in evaluation mode: built, with its weights.

        LoRA weights are merged into the kernel.

        Raises:
            UnsupportedError: for a layer that has no weights yet.
        """
        if not self.built:
            raise UnsupportedError(f"{self.name}: it has no weights yet; call it, or build it, before folding")
        kernel, bias = self.folded()
        return self.realize(kernel, bias, use_bias=bias is not None)

    def realize(self: Any, kernel: np.ndarray, bias: np.ndarray | None, use_bias: bool) -> Any:
        """A plain layer with this layer's arguments and these weights."""
        config = self.get_config()
        for name in (*self.options, "lora_rank", "lora_alpha"):
            config.pop(name, None)
        layer = self.plain.from_config({**config, "use_bias": use_bias})
        layer.build_from_config(self.get_build_config())
        layer.set_weights([kernel, *([bias] if use_bias else [])])
        layer.trainable = self.trainable
        return layer

    @property
    def decomposition(self: Any) -> tuple[int, int]:
        """Groups of the convolution, and input channels of one."""
        kernel = self._kernel
        return (self.groups, kernel.shape[-2]) if hasattr(self, "groups") else (kernel.shape[-2], 1)


def float64(variable: Any) -> np.ndarray:
    """A variable's value in NumPy."""
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)
