"""How Keras' kernels are composed: `foldconv.formulas` on the arrays of Keras or of NumPy, in Keras' layout.

A kernel of Keras is ``(*size, I, O)``, I the input channels of one of G groups. A depthwise one, ``(*size, C, m)``, has
the same entries in the same order as one of C groups, ``(*size, 1, C · m)``, and is treated as such.
"""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

import keras

from ..formulas import centre_tap


class _Primitives:
    """`foldconv.formulas.Primitives` of NumPy and of every backend of Keras."""

    # The arrays' own operator: Keras' matmul makes float32 of float64 on torch.
    matmul = staticmethod(operator.matmul)

    @staticmethod
    def first_taps(x: Any, taps: int) -> Any:
        return x[:, :, :taps]


PRIMITIVES = _Primitives()


def constant(values: np.ndarray, like: Any, array: Any) -> Any:
    """Fixed numbers as an array of `array`'s library and of `like`'s dtype."""
    if array is np:
        return np.asarray(values, like.dtype)
    return array.convert_to_tensor(values, keras.backend.standardize_dtype(like.dtype))


def common(kernel: Any, groups: int, channels: int, array: Any) -> Any:
    """A kernel of Keras, `channels` being its I, as the ``(G, I, k, o)`` of `foldconv.formulas`.

    >>> common(np.ones((3, 3, 2, 8)), 4, 2, np).shape
    (4, 2, 9, 2)
    >>> common(np.ones((3, 3, 4, 2)), 4, 1, np).shape  # depthwise
    (4, 1, 9, 2)
    """
    taps = int(np.prod(kernel.shape[:-2]))
    out = int(np.prod(kernel.shape[-2:])) // (groups * channels)
    return array.transpose(array.reshape(kernel, (taps, channels, groups, out)), (2, 1, 0, 3))


def back(composed: Any, shape: Sequence[int], array: Any) -> Any:
    """The inverse of `common`, into the shape of the kernel."""
    return array.reshape(array.transpose(composed, (2, 1, 0, 3)), tuple(shape))


def per_output(values: Any, groups: int, array: Any) -> Any:
    """``(O,)`` as ``(G, 1, 1, o)``."""
    return array.reshape(values, (groups, 1, 1, -1))


def at_centre(size: Sequence[int]) -> np.ndarray:
    """``(1, 1, k, 1)``: one at the tap of a 1×1 branch, else zero."""
    taps = int(np.prod(size))
    return np.eye(taps)[centre_tap(size)].reshape(1, 1, taps, 1)
