"""Weights of the Gluon layer of yangyanli/DO-Conv.

It stores ``weight (out, in/g, M, N)``, ``bias`` and ``D (k, S, in)``, what is added to the identity, with S = k = M·N.
With groups its reshape gives input channel i of group g the row ``i·G + g`` of D instead of ``g·(in/G) + i``: another
order of the same rows, so the function survives by ordering them anew.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mxnet as mx
import numpy as np

from ..errors import CheckpointError
from .layers import DOConv2D


def load_original(layer: DOConv2D, values: Mapping[str, Any]) -> None:
    """Give `layer` the weights of the original layer, so that it computes the same.

    Args:
        layer: with the original's arguments, initialized or not; S = k. Its `in_channels` may still be unknown; in
            layout NHWC, which the original does not have, its weight is transposed.
        values: NumPy or MXNet arrays by the original's names: ``weight``, ``D`` (not for one tap), ``bias`` (if used).

    Raises:
        CheckpointError: for a missing, a superfluous or a misshapen array; the layer is as it was.

    Example:
        >>> layer = DOConv2D(2, 3, in_channels=4, use_bias=False)
        >>> load_original(layer, {"weight": np.ones((2, 4, 3, 3)), "D": np.zeros((9, 9, 4))})
        >>> layer.D.shape
        (4, 9, 9)
    """
    arrays = {
        name: value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value) for name, value in values.items()
    }
    expected = set(layer._reg_params)
    if set(arrays) != expected:
        raise CheckpointError(
            f"{layer.name}: expected the arrays {sorted(expected)}, received {sorted(arrays)}; "
            "the original has no depth_multiplier, and D only beyond one tap"
        )
    groups, weight = layer._kwargs["num_group"], arrays["weight"]
    known = layer._inputs_per_group
    channels = weight.shape[1] * groups if weight.ndim == 4 else 0
    shapes = {"weight": (layer._channels, channels // groups, *layer._kwargs["kernel"]), "bias": (layer._channels,)}
    shapes["D"] = (layer._taps, layer._taps, channels)
    for name, array in arrays.items():
        if array.shape != shapes[name] or (name == "weight" and known not in (0, array.shape[1])):
            raise CheckpointError(
                f"{layer.name}: {name}: expected {shapes[name]}, received {array.shape}; the layer is {layer!r}"
            )
    if "D" in arrays:
        rows = np.arange(channels).reshape(channels // groups, groups).T.reshape(-1)
        arrays["D"] = arrays["D"].transpose(2, 0, 1)[rows]
    if layer._channels_last:
        arrays["weight"] = weight.transpose(0, 2, 3, 1)
    for name, parameter in layer._reg_params.items():
        parameter.shape = arrays[name].shape
        if parameter._data is None and not parameter._deferred_init:
            parameter.initialize()
        parameter.set_data(mx.nd.array(arrays[name], dtype=parameter.dtype))
