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
from .surgery import _named


def load_original(block: Any, values: Mapping[str, Any]) -> None:
    """Give a layer, or all of a network, the weights of the original layers, so that it computes the same.

    Args:
        block: a `DOConv2D` with the original's arguments and S = k, or a Block whose `DOConv2D` stand where the
            original's stood. Initialized or not; each `in_channels` may still be unknown. In layout NHWC, which the
            original does not have, weights are transposed.
        values: NumPy or MXNet arrays by the names in the file of `save_parameters` (``mx.nd.load`` reads it): for a
            layer ``weight``, ``D`` (not for one tap) and ``bias`` (if used).

    Raises:
        CheckpointError: for a missing, a superfluous or a misshapen array; the block is as it was.

    Example:
        >>> layer = DOConv2D(2, 3, in_channels=4, use_bias=False)
        >>> load_original(layer, {"weight": np.ones((2, 4, 3, 3)), "D": np.zeros((9, 9, 4))})
        >>> layer.D.shape
        (4, 9, 9)
    """
    arrays = {
        name: value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value) for name, value in values.items()
    }
    parameters = block._collect_params_with_prefix()
    if set(arrays) != set(parameters):
        missing, more = (
            ", ".join(sorted(a - b)[:5]) or "nothing"
            for a, b in ((set(parameters), set(arrays)), (set(arrays), set(parameters)))
        )
        raise CheckpointError(
            f"{type(block).__name__} {block.name}: expected the arrays of its {len(parameters)} parameters; missing: "
            f"{missing}; superfluous: {more}; the original has no depth_multiplier, and D only beyond one tap"
        )
    for prefix, layer in _named(block):
        if isinstance(layer, DOConv2D):
            names = {name: f"{prefix}.{name}" if prefix else name for name in layer._reg_params}
            own = _arranged(layer, {name: arrays[full] for name, full in names.items()}, prefix or layer.name)
            arrays |= {names[name]: array for name, array in own.items()}
    for name, parameter in parameters.items():
        known = parameter.shape or ()
        if known and (
            len(known) != arrays[name].ndim or any(k not in (0, n) for k, n in zip(known, arrays[name].shape))
        ):
            raise CheckpointError(f"{name}: expected {known} (0: not known yet), received {arrays[name].shape}")
    for name, parameter in parameters.items():
        parameter.shape = arrays[name].shape
        if parameter._data is None and not parameter._deferred_init:
            parameter.initialize()
        parameter.set_data(mx.nd.array(arrays[name], dtype=parameter.dtype))


def _arranged(layer: DOConv2D, arrays: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """The original's arrays in our order, their shapes checked."""
    groups, weight = layer._kwargs["num_group"], arrays["weight"]
    known = layer._inputs_per_group
    channels = weight.shape[1] * groups if weight.ndim == 4 else 0
    shapes = {"weight": (layer._channels, known or channels // groups, *layer._kwargs["kernel"])}
    shapes |= {"bias": (layer._channels,), "D": (layer._taps, layer._taps, channels)}
    for name, array in arrays.items():
        if name not in shapes or array.shape != shapes[name]:
            raise CheckpointError(
                f"{where}: {name}: expected {shapes.get(name, 'no such array')}, received {array.shape}; "
                f"the layer is {layer!r}"
            )
    arranged = dict(arrays)
    if "D" in arrays:
        rows = np.arange(channels).reshape(channels // groups, groups).T.reshape(-1)
        arranged["D"] = arrays["D"].transpose(2, 0, 1)[rows]
    if layer._channels_last:
        arranged["weight"] = weight.transpose(0, 2, 3, 1)
    return arranged
