"""Weights of the DO-Conv authors' TensorFlow layer."""

from __future__ import annotations

import math
from typing import Any

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import numpy as np

from ..errors import CheckpointError
from .doconv import DOConv2D


def import_doconv(layer: DOConv2D, kernel: Any, D: Any, bias: Any = None) -> None:
    """Load the weights of the original ``DOConv2D`` of TensorFlow into a built layer; the function is the same.

    With one group, or one input channel per group, the parameters go over one to one and train alike. Otherwise the
    original pairs D with other channels than the paper; then the composed kernel becomes ``kernel``, and D zero.

    Args:
        layer: built, with the arguments of the original; its `depth_multiplier` is the original's `D_mul`.
        kernel: ``(S, in / groups, filters)``.
        D: ``(k, S, in)``; what the original adds its constant identity to.
        bias: ``(filters,)``, or None.

    Raises:
        CheckpointError: for arrays of other shapes than the layer's.

    Source: yangyanli/DO-Conv, do_conv_tensorflow.py.

    Example:
        >>> import keras
        >>> layer = DOConv2D(8, 3, use_bias=False)
        >>> layer.build((1, 5, 5, 4))
        >>> import_doconv(layer, np.ones((9, 4, 8)), np.zeros((9, 9, 4)))
        >>> bool(keras.ops.all(layer.kernel == 1))
        True
    """
    target: Any = layer
    shape = tuple(target.own_kernel.shape)
    taps, channels, groups, S = math.prod(shape[:2]), shape[2] * target.groups, target.groups, target.depth_multiplier
    wanted = {"kernel": (S, *shape[2:]), "D": (taps, S, channels), "bias": (shape[3],) if target.use_bias else None}
    for name, value in (("kernel", kernel), ("D", D), ("bias", bias)):
        received = None if value is None else np.shape(value)
        if received != wanted[name] and not (name == "D" and taps == 1 and value is None):
            raise CheckpointError(
                f"{target.name}: {name}: expected shape {wanted[name]}, received {received}; give the layer the "
                "original's arguments, its D_mul as depth_multiplier"
            )
    W, residual = np.asarray(kernel, np.float64), None
    if taps > 1:
        # The original's identity, repeated as often as it fits into S; ours is there once.
        theirs = np.concatenate([np.tile(np.eye(taps), S // taps), np.zeros((taps, S % taps))], axis=1)
        residual = np.asarray(D, np.float64) + (theirs - np.eye(taps, S))[:, :, None]
        if groups > 1 and shape[2] > 1:
            full = residual + np.eye(taps, S)[:, :, None]
            composed = np.einsum("msi,sio->mio", full, W.reshape(S, channels, -1)).reshape(taps, *shape[2:])
            W, residual = np.concatenate([composed, W[taps:]]), np.zeros_like(residual)
    values = {"kernel": W[:taps].reshape(shape), "kernel_extra": W[taps:], "bias": bias}
    if residual is not None:
        values["D"] = residual.transpose(2, 0, 1)
    for variable in target.weights:
        variable.assign(values[variable.name])
