"""What a network is calibrated with and judged by: tensors, batches, loaders, with labels or without."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UnsupportedError, shown


@dataclasses.dataclass(frozen=True)
class Samples:
    """Inputs, each ``(N, ...)``, by keyword or in order, and the class of each sample if there are labels."""

    inputs: dict[str | int, Tensor]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def example(self, count: int) -> Any:
        """A few samples, as the network is called with them."""
        some = {key: value[:count] for key, value in self.inputs.items()}
        return tuple(some.values()) if 0 in some else some

    def batches(self, size: int) -> list[list[np.ndarray]]:
        """Arrays of so many samples, the last of what is left."""
        values = [value.numpy() for value in self.inputs.values()]
        return [[value[i : i + size] for value in values] for i in range(0, len(self), size)]


def read_samples(given: Any, name: str) -> Samples:
    """All samples of a tensor, a sequence of batches or a loader.

    A batch is a tensor, a tuple of tensors, a dictionary of them by keyword, or a pair of one of these and labels:
    whole numbers, one for each sample. A pair of a tensor and labels is also taken as the whole.

    Args:
        given: the data.
        name: of the argument, for messages.

    Raises:
        UnsupportedError: no samples, several sizes, NaN, labels for some batches only, or something else.

    Example:
        >>> batches = [(torch.zeros(2, 3), torch.tensor([0, 1])), (torch.zeros(1, 3), torch.tensor([1]))]
        >>> samples = read_samples(batches, "calibration")
        >>> len(samples), samples.labels, [batch[0].shape for batch in samples.batches(2)]
        (3, tensor([0, 1, 1]), [(2, 3), (1, 3)])
    """
    if isinstance(given, Dataset):
        raise UnsupportedError(f"{name}: expected batches, received a {type(given).__name__}; wrap it in a DataLoader")
    whole = isinstance(given, (Tensor, np.ndarray, Mapping)) or _is_labelled(given)
    if not whole and not isinstance(given, Iterable):
        raise UnsupportedError(f"{name}: expected a tensor, batches or a loader, received {shown(given)}")
    batches = [_read_batch(each, f"{name}: batch {i}") for i, each in enumerate([given] if whole else given)]
    if not sum(len(batch) for batch in batches):
        raise UnsupportedError(f"{name}: expected at least one sample, received none")
    first = batches[0]
    for i, batch in enumerate(batches):
        if _sizes(batch) != _sizes(first):
            raise UnsupportedError(
                f"{name}: batch {i}: expected samples of {_shown_sizes(first)}, as in batch 0, received "
                f"{_shown_sizes(batch)}"
            )
        if (batch.labels is None) != (first.labels is None):
            raise UnsupportedError(f"{name}: batch {i}: expected labels in all batches or in none")
    inputs = {key: torch.cat([batch.inputs[key] for batch in batches]) for key in first.inputs}
    labels = (
        None if first.labels is None else torch.cat([batch.labels for batch in batches if batch.labels is not None])
    )
    return Samples(inputs, labels)


def _is_labelled(given: Any) -> bool:
    """A pair of inputs and labels."""
    if not isinstance(given, (tuple, list)) or len(given) != 2 or not isinstance(given[1], (Tensor, np.ndarray)):
        return False
    inputs, labels = given
    return not isinstance(inputs, np.generic) and labels.ndim == 1 and torch.as_tensor(labels).dtype in _WHOLE


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _read_batch(given: Any, where: str) -> Samples:
    labels = None
    if _is_labelled(given):
        given, labels = given
        labels = torch.as_tensor(labels).detach().cpu().long()
    values: dict[Any, Any] = dict(given) if isinstance(given, Mapping) else {}
    if not values:
        values = dict(enumerate(given if isinstance(given, (tuple, list)) else [given]))
    inputs: dict[str | int, Tensor] = {}
    for key, value in values.items():
        if not isinstance(value, (Tensor, np.ndarray)) or value.ndim < 1:
            raise UnsupportedError(
                f"{where}: expected a tensor, several, or a pair of them and labels, whole numbers of shape (N,); "
                f"received {shown(given)}"
            )
        tensor = torch.as_tensor(value).detach().cpu()
        inputs[key] = tensor.float() if tensor.is_floating_point() else tensor
        if not bool(torch.isfinite(inputs[key]).all()):
            raise UnsupportedError(f"{where}: holds NaN or infinity; leave such samples out")
    counts = [len(value) for value in (*inputs.values(), *([] if labels is None else [labels]))]
    if len(set(counts)) != 1:
        raise UnsupportedError(f"{where}: expected as many labels as samples, received {counts}")
    return Samples(inputs, labels)


def _sizes(batch: Samples) -> dict[Any, Any]:
    return {key: (value.shape[1:], value.dtype) for key, value in batch.inputs.items()}


def _shown_sizes(batch: Samples) -> str:
    return ", ".join(f"shape {tuple(value.shape[1:])} ({value.dtype})" for value in batch.inputs.values())
