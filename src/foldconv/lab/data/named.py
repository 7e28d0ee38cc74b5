"""MNIST, Fashion-MNIST and CIFAR as torchvision downloads and reads them, or from an .npz file beside them."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import UnsupportedError
from .arrays import Arrays, resized
from .npz import read_npz


@dataclasses.dataclass(frozen=True)
class Named:
    """A set that torchvision knows.

    Args:
        dataset: the class's name in torchvision.datasets.
        mean: published per channel, of pixels in [0, 1].
        std: the same for the standard deviation.
    """

    dataset: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


NAMED = {
    "mnist": Named("MNIST", (0.1307,), (0.3081,)),
    "fashion-mnist": Named("FashionMNIST", (0.2860,), (0.3530,)),
    "cifar10": Named("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Named("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def read_named(name: str, folder: str | os.PathLike[str], download: bool, image_size: int | None) -> Arrays:
    """The images of a set in `NAMED`; read once per process.

    ``NAME.npz`` in the folder is taken if it is there (so also where nothing can be downloaded). CIFAR's files are
    pickles: torchvision compares their MD5 with that of the published ones before it reads them.

    Raises:
        UnsupportedError: the set is not there and cannot be downloaded, or its files are damaged.
    """
    file = Path(folder, f"{name}.npz")
    if file.is_file():
        return read_npz(file, image_size)
    return _read(name, os.path.realpath(folder), str(folder), download, image_size)


@functools.lru_cache(maxsize=2)
def _read(name: str, _place: str, folder: str, download: bool, image_size: int | None) -> Arrays:
    from torchvision import datasets

    kind = getattr(datasets, NAMED[name].dataset)
    try:
        train, test = (_dataset(kind, folder, download, train) for train in (True, False))
        pixels = [_pixels(train.data), _pixels(test.data)]
    except Exception as error:  # of the network, of the disk, or of a file that is not what it should be
        # torchvision's advice is of no use to those who have no such argument
        reason = " ".join(str(error).split()).partition(" You can use download=True")[0] or type(error).__name__
        remedy = f"put {name}.npz there, or the files of torchvision.datasets.{kind.__name__}"
        also = ", or allow the download" if not download else ""
        raise UnsupportedError(f"{folder}: expected the data set {name}, received: {reason}; {remedy}{also}") from error
    labels = [torch.as_tensor(each.targets, dtype=torch.int64) for each in (train, test)]
    pixels = [resized(each, image_size) for each in pixels]
    return Arrays(folder, pixels[0], labels[0], pixels[1], labels[1], tuple(map(str, train.classes)))


def _dataset(kind: Any, folder: str, download: bool, train: bool) -> Any:
    """Nothing is fetched, nor a folder made, while the files are there."""
    try:
        return kind(folder, train=train, download=False)
    except (RuntimeError, FileNotFoundError):
        if not download:
            raise
        return kind(folder, train=train, download=True)


def _pixels(data: Any) -> torch.Tensor:
    """(N, H, W) tensors or (N, H, W, C) arrays to (N, C, H, W)."""
    images = torch.from_numpy(np.ascontiguousarray(data))
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
