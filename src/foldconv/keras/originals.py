"""Weights of the DO-Conv authors' TensorFlow layer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import numpy as np

import keras

from ..errors import CheckpointError, UnsupportedError, unknown
from .doconv import DOConv, DOConv2D


def import_checkpoint(arrays: str | os.PathLike[str] | Mapping[str, Any], model: Any, source: str) -> DOConv2D:
    """A layer that computes what the original ``DOConv2D`` of TensorFlow computes with its weights.

    With one group, or one input channel per group, the parameters go over one to one and train alike. Otherwise the
    original pairs D with other channels than the paper; then the composed kernel becomes ``kernel``, and D zero.

    Args:
        arrays: ``kernel``, ``(S, in / groups, filters)``; ``D``, ``(k, S, in)``, what the original adds its constant
            identity to (not for one tap); ``bias``, ``(filters,)``, if used. Or the path of an ``.npz`` with these.
        model: a built ``Conv2D`` (or `DOConv2D`) with the arguments of the original; it is left as it is. A network's
            layers are imported one by one.
        source: ``"do-conv"``, the repository that the weights come from.

    Returns:
        A `DOConv2D` in the place of `model`, its ``depth_multiplier`` the S of the arrays.

    Raises:
        CheckpointError: for arrays of other names or shapes than the layer's, or a file that holds none.
        UnsupportedError: for another source, or another layer.

    Source: yangyanli/DO-Conv, do_conv_tensorflow.py.

    Example:
        >>> plain = keras.layers.Conv2D(8, 3, use_bias=False)
        >>> plain.build((1, 5, 5, 4))
        >>> layer = import_checkpoint({"kernel": np.ones((9, 4, 8)), "D": np.zeros((9, 9, 4))}, plain, "do-conv")
        >>> bool(keras.ops.all(layer.kernel == 1))
        True
    """
    if source != "do-conv":
        raise UnsupportedError(unknown("checkpoint source", source, ["do-conv"]))
    if type(model) not in (keras.layers.Conv2D, DOConv2D) or not model.built:
        raise UnsupportedError(
            f"model: expected a built Conv2D with the original's arguments, received {type(model).__name__}"
            f"{'' if model.built else ' without weights'}"
        )
    given = _read(arrays)
    shape, groups = tuple(model._kernel.shape), model.groups
    taps, channels = math.prod(shape[:2]), shape[2] * groups
    S = max(taps, len(given.get("kernel", ()))) if taps > 1 else 1
    wanted = {"kernel": (S, *shape[2:])}
    wanted |= {"D": (taps, S, channels)} if taps > 1 or "D" in given else {}
    wanted |= {"bias": (shape[3],)} if model.use_bias else {}
    for name in {**wanted, **given}:
        received = np.shape(given[name]) if name in given else None
        if received != wanted.get(name):
            raise CheckpointError(
                f"{model.name}: {name}: expected shape {wanted.get(name)}, received {received}; give the layer the "
                "original's arguments"
            )
    W: Any = np.asarray(given["kernel"], np.float64)
    residual: Any = None
    if taps > 1:
        # The original's identity, repeated as often as it fits into S; ours is there once.
        theirs = np.concatenate([np.tile(np.eye(taps), S // taps), np.zeros((taps, S % taps))], axis=1)
        residual = np.asarray(given["D"], np.float64) + (theirs - np.eye(taps, S))[:, :, None]
        if groups > 1 and shape[2] > 1:
            full = residual + np.eye(taps, S)[:, :, None]
            composed = np.einsum("msi,sio->mio", full, W.reshape(S, channels, -1)).reshape(taps, *shape[2:])
            W, residual = np.concatenate([composed, W[taps:]]), np.zeros_like(residual)
    values: dict[str, Any] = {"kernel": W[:taps].reshape(shape), "kernel_extra": W[taps:], "bias": given.get("bias")}
    if residual is not None:
        values["D"] = residual.transpose(2, 0, 1)
    layer = DOConv(S).expand(model.fold() if isinstance(model, DOConv2D) else model)
    for variable in layer.weights:
        variable.assign(values[variable.name])
    return layer


def _read(arrays: Any) -> dict[str, Any]:
    if isinstance(arrays, Mapping):
        return dict(arrays)
    try:
        with np.load(arrays) as file:
            return dict(file)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{arrays}: expected an .npz with kernel, D and bias: {error}") from None
