"""Weights of the Gluon layer of yangyanli/DO-Conv.

It stores ``weight (out, in/g, M, N)``, ``bias`` and ``D (k, S, in)``, what is added to the identity, with S = k = M·N.
With groups its reshape gives input channel i of group g the row ``i·G + g`` of D instead of ``g·(in/G) + i``: another
order of the same rows, so the function survives by ordering them anew.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import mxnet as mx
import numpy as np

from ..errors import CheckpointError, UnsupportedError, unknown
from ._tree import copy_of, named, walk
from .layers import DOConv2D
from .network import expand


def import_checkpoint(arrays: str | os.PathLike[str] | Mapping[str, Any], model: Any, source: str) -> Any:
    """A layer or a network that computes what the original layers compute with their weights.

    Args:
        arrays: the path of a file of `save_parameters`, or NumPy or MXNet arrays by the names that it has there: for a
            layer ``weight``, ``D`` (not for one tap) and ``bias`` (if used).
        model: a plain Block whose convolutions are the original's, but where those were DO-Convs, or one whose
            `DOConv2D` (S = k) stand where the original's stood; left as it is. Initialized or not; each `in_channels`
            may still be unknown. In layout NHWC, which the original does not have, weights are transposed.
        source: ``"do-conv"``, the repository that the weights come from.

    Returns:
        A copy of `model` with `DOConv2D`, where it has none for all its convolutions of more than one tap, and with the
        arrays.

    Raises:
        CheckpointError: for a missing, a superfluous or a misshapen array, or a file that holds none.
        UnsupportedError: for another source.

    Example:
        >>> arrays = {"weight": np.ones((2, 4, 3, 3)), "D": np.zeros((9, 9, 4))}
        >>> layer = import_checkpoint(arrays, mx.gluon.nn.Conv2D(2, 3, in_channels=4, use_bias=False), "do-conv")
        >>> layer.D.shape
        (4, 9, 9)
    """
    if source != "do-conv":
        raise UnsupportedError(unknown("checkpoint source", source, ["do-conv"]))
    values = _read(arrays)
    block = copy_of(model) if any(isinstance(part, DOConv2D) for part in walk(model)) else expand(model, "doconv")
    parameters = block._collect_params_with_prefix()
    if set(values) != set(parameters):
        missing, more = (
            ", ".join(sorted(a - b)[:5]) or "nothing"
            for a, b in ((set(parameters), set(values)), (set(values), set(parameters)))
        )
        raise CheckpointError(
            f"{type(block).__name__} {block.name}: expected the arrays of its {len(parameters)} parameters; missing: "
            f"{missing}; superfluous: {more}; the original has no depth_multiplier, and D only beyond one tap"
        )
    for prefix, layer in named(block):
        if isinstance(layer, DOConv2D):
            names = {name: f"{prefix}.{name}" if prefix else name for name in layer._reg_params}
            own = _arranged(layer, {name: values[full] for name, full in names.items()}, prefix or layer.name)
            values |= {names[name]: array for name, array in own.items()}
    for name, parameter in parameters.items():
        known = parameter.shape or ()
        if known and (
            len(known) != values[name].ndim or any(k not in (0, n) for k, n in zip(known, values[name].shape))
        ):
            raise CheckpointError(f"{name}: expected {known} (0: not known yet), received {values[name].shape}")
    for name, parameter in parameters.items():
        parameter.shape = values[name].shape
        if parameter._data is None and not parameter._deferred_init:
            parameter.initialize()
        parameter.set_data(mx.nd.array(values[name], dtype=parameter.dtype))
    return block


def _read(arrays: Any) -> dict[str, np.ndarray]:
    if not isinstance(arrays, Mapping):
        try:
            found = mx.nd.load(os.fspath(arrays))
        except mx.MXNetError as error:
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(f"{arrays}: expected a file of MXNet: {reason}") from None
        if not isinstance(found, dict):
            raise CheckpointError(f"{arrays}: expected arrays by name, found a list; save by save_parameters")
        arrays = found
    return {name: v.asnumpy() if hasattr(v, "asnumpy") else np.asarray(v) for name, v in arrays.items()}


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
