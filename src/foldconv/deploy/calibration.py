"""Calibration data: batches of what a network is called with, looked at before anything is computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
    if isinstance(calibration, (str, bytes, nn.Module)) or not isinstance(calibration, (Tensor, Iterable)):
        raise TypeError(f"calibration: expected {WHAT}, received {shown(calibration)}")
    whole = isinstance(calibration, (Tensor, tuple, Mapping))
    number = 0
    for number, batch in enumerate([calibration] if whole else calibration, 1):
        yield _checked("calibration" if whole else f"calibration: batch {number}", batch)
    if not number:
        raise UnsupportedError("calibration: expected at least one batch, received none")


def _checked(where: str, batch: Any) -> Any:
    args, kwargs = arguments_of(batch)
    values = {**dict(enumerate(args)), **kwargs}
    wrong = [value for value in values.values() if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(f"{where}: expected {WHAT}, received {shown(wrong[0])} in it")
    if len(args) == 2 and _are_labels(args[1], args[0]):
        del values[1]
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
    if kwargs:
        return numbers
    return next(iter(numbers.values())) if len(numbers) == 1 else tuple(numbers.values())


def _are_labels(value: Tensor, samples: Tensor) -> bool:
    whole = not value.is_floating_point() and value.dtype != torch.bool
    return whole and value.dim() == 1 < samples.dim() and len(value) == len(samples)
