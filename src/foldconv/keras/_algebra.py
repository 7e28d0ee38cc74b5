"""How Keras' kernels are composed: `foldconv.mathematics` with Keras' primitives, or NumPy's, and Keras' layout."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any

import numpy as np

import keras

from .. import mathematics


class _Keras:
    """`foldconv.mathematics.Primitives` of the current Keras backend."""

    matmul = staticmethod(keras.ops.matmul)

    @staticmethod
    def first_taps(x: Any, taps: int) -> Any:
        return x[:, :, :taps]


class _NumPy(_Keras):
    """The same in NumPy, for folding in float64 whatever the backend."""

    matmul = staticmethod(np.matmul)


def doconv(kernel: Any, extra: Any, D: Any, groups: int, array: Any = keras.ops) -> Any:
    """The composed kernel, in the shape of `kernel`.

    Args:
        kernel: ``(*kernel_size, I, O)``, I the input channels of a group; a depthwise kernel is
            ``(*kernel_size, C, multiplier)`` and has ``groups=1`` here: no sum runs over the channels.
        extra: the surplus taps, ``(S - k, I, O)``, or None.
        D: ``(groups · I, k, S)``.
        groups: of the convolution.
        array: ``keras.ops``, or ``numpy``, the library of the arrays.

    Example:
        >>> import numpy
        >>> doconv(numpy.ones((3, 3, 4, 8)), None, numpy.zeros((4, 9, 9)), 1, numpy).shape
        (3, 3, 4, 8)
    """
    channels, out = kernel.shape[-2:]
    taps, multiplier = D.shape[1:]
    W = array.reshape(kernel, (taps, channels, groups, out // groups))
    if extra is not None:
        extra = array.reshape(extra, (multiplier - taps, channels, groups, out // groups))
        W = array.concatenate([W, extra], axis=0)
    primitives = _NumPy() if array is np else _Keras()
    common = array.transpose(W, (2, 1, 0, 3))  # (G, I, S, o)
    composed = mathematics.doconv(common, array.reshape(D, (groups, channels, taps, multiplier)), taps, primitives)
    return array.reshape(array.transpose(composed, (2, 1, 0, 3)), kernel.shape)
