"""What a file tells a stranger: its inputs and outputs, the classes' names, how to prepare an image, who wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
from torch import Tensor

from .. import __version__
from ..errors import UnsupportedError, shown
from .formats import Format


def described(
    form: Format,
    inputs: Sequence[Tensor],
    outputs: Sequence[np.ndarray],
    any_batch: bool,
    labels: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The description as plain values.

    Args:
        form: the format, whose packages' versions are noted.
        inputs, outputs: of one call; their sizes are noted, the batch's as None where any will do.
        any_batch: whether the file takes batches of any size.
        labels: the classes' names, one for each number along the first output's second dimension.
        preprocessing: plain values.

    Raises:
        TypeError: labels that are no sequence of names.
        UnsupportedError: for as many labels as there are no classes, and for values that JSON does not know.

    Example:
        >>> import torch
        >>> form = Format("torch.export", ".pt2", "torch_export.py", None)
        >>> found = described(form, [torch.zeros(1, 3)], [np.zeros((1, 2))], True, ["cat", "dog"], None)
        >>> found["inputs"], found["labels"]
        ([{'shape': [None, 3], 'dtype': 'float32'}], ['cat', 'dog'])
    """
    if labels is not None:
        if isinstance(labels, (str, bytes)) or not isinstance(labels, Iterable):
            raise TypeError(f"labels: expected a list of names, one for each class, received {shown(labels)}")
        labels = [str(label) for label in labels]
        classes = outputs[0].shape[1] if outputs[0].ndim > 1 else None
        if len(labels) != classes:
            raise UnsupportedError(f"labels: expected {classes} names, one for each class, received {len(labels)}")
    packages = ("torch", *form.packages)
    description = {
        "foldconv": __version__,
        "format": form.name,
        "versions": {package: metadata.version(package) for package in packages},
        "inputs": [_tensor(x.shape, str(x.dtype).removeprefix("torch."), any_batch) for x in inputs],
        "outputs": [_tensor(x.shape, "float32" if x.dtype == np.float64 else str(x.dtype), any_batch) for x in outputs],
        "labels": labels,
        "preprocessing": None if preprocessing is None else dict(preprocessing),
    }
    try:
        json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(
            f"preprocessing: expected values that JSON knows, received {shown(preprocessing)}: {error}"
        ) from None
    return description


def _tensor(shape: Sequence[int], dtype: str, any_batch: bool) -> dict[str, Any]:
    return {"shape": [None if any_batch else shape[0], *map(int, shape[1:])], "dtype": dtype}
