"""Data sets of images and labels, small enough to be held in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from ..errors import UnsupportedError, nearest


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Images (float32, normalized, channels first) and labels (int64), split for training and testing."""

    name: str
    train: Dataset
    test: Dataset
    num_classes: int
    input_shape: tuple[int, int, int]
    """Channels, height, width."""


class EpochShuffle(Sampler[int]):
    """A new order each epoch that depends on the seed and the epoch alone, so that a resumed run continues in it.

    Args:
        count: number of samples.
        seed: of the run.
        epoch: tells the current epoch, asked whenever a pass begins.

    >>> order = EpochShuffle(5, seed=0, epoch=lambda: 3)
    >>> list(order) == list(order), sorted(order)
    (True, [0, 1, 2, 3, 4])
    """

    def __init__(self, count: int, seed: int, epoch: Callable[[], int]):
        self._count, self._seed, self._epoch = count, seed, epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self._seed, self._epoch()))
        return iter(torch.randperm(self._count, generator=generator).tolist())


def epoch_seed(seed: int, epoch: int) -> int:
    """One seed per run and epoch; different for neighbours in either."""
    return (seed * 1_000_003 + epoch + 1) % 2**63


def training_loader(data: ImageData, batch_size: int, seed: int, epoch: Callable[[], int]) -> DataLoader:
    """Shuffled batches; the last one may be smaller, but is never a single image (batch norm needs two)."""
    count = len(data.train)  # pyright: ignore[reportArgumentType]
    return DataLoader(
        data.train,
        batch_size=batch_size,
        sampler=EpochShuffle(count, seed, epoch),
        drop_last=count % batch_size == 1,
    )


def evaluation_loader(data: ImageData) -> DataLoader:
    """The test images in order, in batches of at most 256."""
    return DataLoader(data.test, batch_size=256)


def create_data(name: str) -> ImageData:
    """A data set by name.

    Raises:
        UnsupportedError: no such name; the nearest is given.

    >>> data = create_data("digits")
    >>> len(data.train), len(data.test), data.train[0][0].shape
    (1437, 360, torch.Size([1, 8, 8]))
    """
    if name not in _LOADERS:
        raise UnsupportedError(
            f"no data set named {name!r}{nearest(name, _LOADERS)}; expected one of: {', '.join(list_data())}"
        )
    return _LOADERS[name]()


def list_data() -> list[str]:
    """The names of all data sets.

    >>> list_data()
    ['digits']
    """
    return sorted(_LOADERS)


def _digits() -> ImageData:
    """scikit-learn's handwritten digits: 1797 scans of 8×8 pixels with 17 grey levels, a stratified fifth for testing.

    The split never depends on the seed of a run: accuracies of different runs are about the same images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(labels).long()
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return ImageData(
        "digits",
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
        num_classes=10,
        input_shape=(1, 8, 8),
    )


_LOADERS: dict[str, Callable[[], ImageData]] = {"digits": _digits}
