"""Batches in an order that the seed and the epoch alone decide, for one process or for each of several."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from ...errors import UnsupportedError
from .image_data import ImageData

_LOG = logging.getLogger(__name__)
EVALUATION_BATCH = 256
ON_DEVICE = 4 * 2**30
"""Bytes of images up to which a split is held on the device; a larger one stays in memory, and its batches travel."""


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


class Batches:
    """An iterable of batches with a length; what `training_loader` and `evaluation_loader` give.

    It is no `DataLoader`, so that Lightning leaves its order, and the share of each process, as they are.
    """

    def __init__(self, shares: list[tuple[int, int]], begin: Callable[[], Iterator[Any]]):
        self._shares, self._begin = shares, begin

    def __len__(self) -> int:
        return len(self._shares)

    def __iter__(self) -> Iterator[Any]:
        return self._begin()


class Plan(NamedTuple):
    """One pass: image indices in order, and the seed of what is random in it (None: nothing is)."""

    order: list[int]
    seed: int | None


def training_loader(
    data: ImageData,
    batch_size: int,
    seed: int,
    epoch: Callable[[], int],
    *,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Batches:
    """Shuffled, augmented batches; the last one may be smaller, but is never a single image (batch norm needs two).

    Order and augmentation depend on the seed and the epoch alone, and not on device, workers or the number of
    processes: with ``world_size`` processes, those of one step have together what a single process with
    ``batch_size * world_size`` has (of the epoch's last images, up to ``world_size - 1`` are left out, so that all
    processes have equally many).

    Args:
        data: from `create_data`.
        batch_size: images per step and process.
        seed: of the run.
        epoch: tells the current epoch, asked whenever a pass begins.
        device: where a set that is held as tensors goes, and where its batches come from.
        rank: which of the processes this is.
        world_size: how many processes share the images.
        workers: processes that decode images; a set that is held as tensors needs none.

    Raises:
        UnsupportedError: on iteration: an image that cannot be read, with ``corrupt_images="error"``.

    >>> import foldconv
    >>> loader = training_loader(foldconv.train.create_data("digits"), 64, seed=0, epoch=lambda: 0)
    >>> len(loader), next(iter(loader))[0].shape
    (23, torch.Size([64, 1, 8, 8]))
    """
    count = _length(data.train)
    shares = []
    for start in range(0, count, batch_size * world_size):
        each = min(batch_size * world_size, count - start) // world_size
        if each > 1:
            shares.append((start + rank * each, start + (rank + 1) * each))
    shuffle = EpochShuffle(count, seed, epoch)

    def plan() -> Plan:
        return Plan(list(shuffle), epoch_seed(seed, epoch()))

    return _batches(data, data.train, shares, plan, device, workers)


def evaluation_loader(
    data: ImageData, *, device: str | torch.device = "cpu", rank: int = 0, world_size: int = 1, workers: int = 0
) -> Batches:
    """The test images in order, each once, in batches of 256 or what `data` says; arguments as in `training_loader`.

    Each of several processes gets equally many batches, of sizes that differ by one at most.
    """
    count, batch = _length(data.test), data.evaluation_batch or EVALUATION_BATCH
    if world_size == 1:
        shares = [(start, min(start + batch, count)) for start in range(0, count, batch)]
    else:
        parts = -(-count // (batch * world_size)) * world_size
        borders = [part * count // parts for part in range(parts + 1)]
        shares = list(itertools.pairwise(borders))[rank::world_size]
    return _batches(data, data.test, shares, lambda: Plan(list(range(count)), None), device, workers)


def travelled(value: Any, *where: Any, **how: Any) -> Any:
    """A tensor, or what holds tensors, after ``Tensor.to``; numbers with a fraction only where `where` is a dtype.

    >>> travelled([torch.ones(1), {"boxes": torch.ones(2)}], torch.float64)[1]["boxes"].dtype
    torch.float64
    """
    if isinstance(value, torch.Tensor):
        keeps = not value.is_floating_point() and bool(where) and isinstance(where[0], torch.dtype)
        return value if keeps else value.to(*where, **how)
    if isinstance(value, dict):
        return {key: travelled(each, *where, **how) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [travelled(each, *where, **how) for each in value]
    return value


def _length(dataset: Dataset) -> int:
    return len(dataset)  # pyright: ignore[reportArgumentType]


def _batches(
    data: ImageData,
    dataset: Dataset,
    shares: list[tuple[int, int]],
    plan: Callable[[], Plan],
    device: str | torch.device,
    workers: int,
) -> Batches:
    if isinstance(dataset, TensorDataset):
        return Batches(shares, _FromTensors(data, dataset, shares, plan, device))
    return Batches(shares, _FromDataset(data, dataset, shares, plan, device, workers))


class _FromTensors:
    """Batches of a set that is held as tensors, on the device."""

    def __init__(
        self,
        data: ImageData,
        dataset: TensorDataset,
        shares: list[tuple[int, int]],
        plan: Callable[[], Plan],
        device: str | torch.device,
    ):
        self._transform, self._shares, self._plan, self._device = data.transform, shares, plan, device
        self._tensors: Sequence[torch.Tensor] = dataset.tensors

    def __call__(self) -> Iterator[list[torch.Tensor]]:
        home = self._device if sum(tensor.nbytes for tensor in self._tensors) <= ON_DEVICE else "cpu"
        self._tensors = [tensor.to(home) for tensor in self._tensors]  # copied in the first pass only
        plan = self._plan()
        draws = None
        if plan.seed is not None:  # another stream than that of the order
            generator = torch.Generator().manual_seed(plan.seed ^ 0x5DEECE66D)
            draws = self._transform.draw(len(plan.order), generator)
        draws = draws if draws is None else draws.to(self._device)
        order = torch.tensor(plan.order, device=home)
        for start, stop in self._shares:
            images, *labels = [tensor[order[start:stop]].to(self._device) for tensor in self._tensors]
            yield [self._transform(images, draws if draws is None else draws[start:stop]), *labels]


class _FromDataset:
    """Batches of a dataset that is asked image by image, in worker processes if there are any."""

    def __init__(
        self,
        data: ImageData,
        dataset: Dataset,
        shares: list[tuple[int, int]],
        plan: Callable[[], Plan],
        device: str | torch.device,
        workers: int,
    ):
        self._data, self._device = data, torch.device(device)
        self._loader = DataLoader(
            _Seeded(dataset),
            batch_sampler=_Keys(shares, plan),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # the global one is the run's, and is left alone
            collate_fn=_Collate(data.name, getattr(dataset, "collate", default_collate)),
        )

    def __call__(self) -> Iterator[list[Any]]:
        empty = len(self._loader) > 0
        for batch, unreadable in self._loader:
            for place, reason, fatal in sorted(unreadable, key=lambda each: not each[2]):
                if fatal:  # said here, since a worker's own exception arrives as a page of text
                    raise UnsupportedError(f"{place}: {reason}")
                if place not in self._data.skipped:
                    _LOG.warning("%s: left out: %s", place, reason)
                self._data.skipped.add(place)
            if batch is not None:
                empty = False
                images, *labels = [travelled(each, self._device, non_blocking=True) for each in batch]
                transform: Any = self._data.transform
                several = isinstance(images, list)  # of different sizes
                yield [[transform(each) for each in images] if several else transform(images), *labels]
        if empty:
            raise UnsupportedError(f"{self._data.name}: expected images, and none could be read; replace them")


class _Keys(Sampler[list[tuple[int, int | None]]]):
    """Lists of image index and that image's seed."""

    def __init__(self, shares: list[tuple[int, int]], plan: Callable[[], Plan]):
        self._shares, self._plan = shares, plan

    def __len__(self) -> int:
        return len(self._shares)

    def __iter__(self) -> Iterator[list[tuple[int, int | None]]]:
        order, seed = self._plan()
        for start, stop in self._shares:
            yield [(i, None if seed is None else (seed * 1_000_003 + i) % 2**63) for i in order[start:stop]]


class _Seeded(Dataset):
    """A dataset whose random choices for an image depend on the seed that comes with its index.

    Its items are an index, its sample, or None, and what could not be read on the way to it.
    """

    def __init__(self, dataset: Dataset):
        self._read = getattr(dataset, "read", None) or (lambda index: (dataset[index], []))

    def __getitem__(self, key: tuple[int, int | None]) -> Any:
        index, seed = key
        if seed is None:
            return index, *self._read(index)
        states = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)
                return index, *self._read(index)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class _Collate:
    """Samples to a batch, beside what could not be read; a batch without any sample is None."""

    def __init__(self, name: str, collate: Callable[[list[Any]], Any]):
        self._name, self._collate = name, collate

    def __call__(self, items: list[tuple[int, Any, list[Any]]]) -> tuple[Any, list[Any]]:
        unread = [each for *_, several in items for each in several]
        samples = {index: sample for index, sample, _ in items if sample is not None}
        try:
            return (collated(self._collate, samples) if samples else None), unread
        except UnsupportedError as error:
            return None, [*unread, (self._name, str(error), True)]


def collated(collate: Callable[[list[Any]], Any], samples: dict[int, Any]) -> Any:
    """Samples, by their index in the dataset, to a batch.

    Raises:
        UnsupportedError: the images have different shapes, and `collate` does not make them one.
    """
    try:
        return collate(list(samples.values()))
    except RuntimeError as error:
        shapes = {index: tuple(getattr(sample[0], "shape", ())) for index, sample in samples.items()}
        first, *others = shapes
        for index in others:
            if shapes[index] != shapes[first]:
                received = f"received {shapes[first]} for image {first} and {shapes[index]} for image {index}"
                raise UnsupportedError(f"expected images of one shape in a batch, {received}; resize them") from error
        raise
