"""Calibration data: batches of what a network is called with, looked at before anything is computed from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ..errors import UnsupportedError, shown
from ..network._watching import arguments_of

WHAT = "a tensor, or an iterable of batches, each a tensor, a tuple of tensors or a dictionary of them"


def batches_of(calibration: Any) -> Iterator[Any]:
    """Each batch: a tensor, a tuple of tensors, or a dictionary of tensors by keyword; numbers in 32 bits.

    A tensor, a tuple or a dictionary is one batch; of any other iterable, such as a list or a loader, each item is
    one. The labels in a loader's pairs, whole numbers with one dimension beside tensors of more, are left out.

    Raises:
        TypeError: no data of that kind.
        UnsupportedError: there is no batch, an empty one, or one that holds NaN or infinity.

    >>> [batch.shape for batch in batches_of([torch.zeros(4, 3), [torch.zeros(2, 3), torch.tensor([1, 0])]])]
    [torch.Size([4, 3]), torch.Size([2, 3])]
    """
    for values, _ in _labelled(calibration, "calibration"):
        if 0 not in values:
            yield values
        else:
            yield values[0] if len(values) == 1 else tuple(values.values())


@dataclasses.dataclass(frozen=True)
class Samples:
    """All samples of several batches.

    Attributes:
        inputs: each ``(N, ...)``, by keyword or by position.
        labels: the class of each sample ``(N,)``, if there are labels.
    """

    inputs: Mapping[str | int, Tensor]
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


def samples_of(given: Any, name: str = "calibration") -> Samples:
    """All samples together, and their labels, where each batch is a pair of tensors and labels.

    Args:
        given: as for `batches_of`.
        name: of the argument, for messages.

    Raises:
        TypeError, UnsupportedError: as `batches_of`; and for samples of several sizes, or labels for some batches only.

    >>> batches = [(torch.zeros(2, 3), torch.tensor([0, 1])), (torch.zeros(1, 3), torch.tensor([1]))]
    >>> samples = samples_of(batches)
    >>> len(samples), samples.labels, [batch[0].shape for batch in samples.batches(2)]
    (3, tensor([0, 1, 1]), [(2, 3), (1, 3)])
    """
    batches = list(_labelled(given, name))
    kinds = [{key: (tuple(value.shape[1:]), value.dtype) for key, value in values.items()} for values, _ in batches]
    for number, (kind, (_, labels)) in enumerate(zip(kinds, batches), 1):
        if kind != kinds[0]:
            sizes = [", ".join(f"{shape} {dtype}" for shape, dtype in each.values()) for each in (kinds[0], kind)]
            raise UnsupportedError(
                f"{name}: batch {number}: expected samples of {sizes[0]}, as in batch 1, received {sizes[1]}"
            )
        counts = [len(value) for value in batches[number - 1][0].values()]
        if len(set(counts)) > 1:
            raise UnsupportedError(
                f"{name}: batch {number}: expected as many samples in each tensor, received {counts}"
            )
        if (labels is None) != (batches[0][1] is None):
            raise UnsupportedError(f"{name}: batch {number}: expected labels in all batches or in none")
    found = [labels for _, labels in batches if labels is not None]
    inputs = {key: torch.cat([values[key] for values, _ in batches]) for key in kinds[0]}
    return Samples(inputs, torch.cat(found) if found else None)


def _labelled(given: Any, name: str) -> Iterator[tuple[dict[Any, Tensor], Tensor | None]]:
    """Each batch by position or keyword, and its labels."""
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        raise TypeError(f"{name}: expected {WHAT}, received a {type(given).__name__}; wrap it in a DataLoader")
    if isinstance(given, (str, bytes, nn.Module)) or not isinstance(given, (Tensor, Iterable)):
        raise TypeError(f"{name}: expected {WHAT}, received {shown(given)}")
    whole = isinstance(given, (Tensor, tuple, Mapping))
    number = 0
    for number, batch in enumerate([given] if whole else given, 1):
        yield _checked(name if whole else f"{name}: batch {number}", batch)
    if not number:
        raise UnsupportedError(f"{name}: expected at least one batch, received none")


def _checked(where: str, batch: Any) -> tuple[dict[Any, Tensor], Tensor | None]:
    args, kwargs = arguments_of(batch)
    labels = None
    if len(args) == 2 and isinstance(args[0], Mapping):
        kwargs, labels, args = dict(args[0]), args[1], ()
    values = {**dict(enumerate(args)), **kwargs}
    wrong = [
        value for value in (*values.values(), *([] if labels is None else [labels])) if not isinstance(value, Tensor)
    ]
    if wrong:
        raise TypeError(f"{where}: expected {WHAT}, received {shown(wrong[0])} in it")
    if len(args) == 2 and _are_labels(args[1], args[0]):
        labels = values.pop(1)
    if not values or not all(value.dim() and value.numel() for value in values.values()):
        shapes = ", ".join(str(tuple(value.shape)) for value in values.values()) or "nothing"
        raise UnsupportedError(f"{where}: expected tensors of at least one sample, received {shapes}")
    numbers = {}
    for key, value in values.items():
        if value.is_meta:
            raise UnsupportedError(f"{where}: is on the meta device and has no values; give samples")
        value = value.detach().cpu()
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UnsupportedError(f"{where}: holds NaN or infinity; leave such samples out")
        numbers[key] = value.float() if value.is_floating_point() else value
    if labels is None:
        return numbers, None
    count = len(next(iter(numbers.values())))
    if labels.shape != (count,) or labels.is_floating_point():
        received = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise UnsupportedError(f"{where}: expected {count} labels, one whole number a sample, received {received}")
    return numbers, labels.detach().cpu().long()


def _are_labels(value: Tensor, samples: Tensor) -> bool:
    whole = not value.is_floating_point() and value.dtype != torch.bool
    return whole and value.dim() == 1 < samples.dim()
