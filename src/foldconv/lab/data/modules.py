"""A `LightningDataModule` of the user's own, named as ``module.path:ClassName``."""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ...errors import UnsupportedError
from ..importing import imported
from .image_data import ImageData
from .loaders import collated


class ModuleImages(Dataset):
    """The dataset behind a module's loader, and how that loader makes batches of it."""

    def __init__(self, loader: DataLoader):
        self._dataset, self.collate = loader.dataset, loader.collate_fn

    def __len__(self) -> int:
        return len(self._dataset)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]


def module_data(name: str, folder: str | os.PathLike[str], download: bool, image_size: int | None) -> ImageData:
    """The set of a `LightningDataModule`.

    The class is called with ``data_dir=folder`` if it has that argument, and nothing else. Of its `train_dataloader`
    and `test_dataloader` (else `val_dataloader`), after `prepare_data` (if downloads are allowed) and `setup`, the
    datasets and how they collate are used. Batch size, order, workers and seeds are the run's own, since a run must
    be repeatable; augmentation and normalization are left to the module. Samples are an image (float32, C×H×W) and a
    label. The number of classes is the module's or the dataset's ``num_classes``, or the length of its ``classes``.

    Raises:
        UnsupportedError: nothing of that name, no `LightningDataModule`, or not such data.
    """
    import lightning.pytorch as pl

    if image_size is not None:
        raise UnsupportedError(
            f"{name}: image_size: expected none with a data module, received {image_size}; resize there"
        )
    kind = imported(name)
    kinds: tuple[type, ...] = (pl.LightningDataModule,)
    if "pytorch_lightning" in sys.modules:  # the same library under its other name
        kinds += (sys.modules["pytorch_lightning"].LightningDataModule,)
    if not isinstance(kind, type) or not issubclass(kind, kinds):
        what = f"the class {kind.__name__}" if isinstance(kind, type) else f"a {type(kind).__name__}"
        raise UnsupportedError(f"{name}: expected a LightningDataModule, received {what}")
    parameters = inspect.signature(kind).parameters
    module: Any = kind(**({"data_dir": str(folder)} if "data_dir" in parameters else {}))
    if download:
        module.prepare_data()
    module.setup("fit")
    train = _images(name, "train_dataloader", module.train_dataloader())
    if kind.test_dataloader is not pl.LightningDataModule.test_dataloader:
        module.setup("test")
        test = _images(name, "test_dataloader", module.test_dataloader())
    else:
        test = _images(name, "val_dataloader", module.val_dataloader())
    image = _first_image(name, train)
    classes = _attribute(module, train, "classes")
    num_classes = _attribute(module, train, "num_classes") or (len(classes) if classes else None)
    if not isinstance(num_classes, int):
        raise UnsupportedError(f"{name}: expected num_classes, or classes, on the module or its dataset, found neither")
    channels, height, width = image.shape
    names = tuple(map(str, classes)) if classes else None
    return ImageData(name, train, test, num_classes, (channels, height, width), names)


def _images(name: str, method: str, loader: Any) -> ModuleImages:
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        what = type(getattr(loader, "dataset", loader)).__name__
        expected = "expected a DataLoader over a dataset with a length"
        raise UnsupportedError(f"{name}: {method}: {expected}, received {what}")
    return ModuleImages(loader)


def _first_image(name: str, images: ModuleImages) -> torch.Tensor:
    try:
        batch = collated(images.collate, {index: images[index] for index in range(min(2, len(images)))})
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error
    image = batch[0] if isinstance(batch, (list, tuple)) and len(batch) == 2 else batch
    if image is batch or not isinstance(image, torch.Tensor) or image.dtype != torch.float32 or image.ndim != 4:
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        expected = "expected batches of float32 images (N, C, H, W) and labels"
        raise UnsupportedError(f"{name}: {expected}, received {what}; add transforms that give that")
    return image[0]


def _attribute(module: Any, images: ModuleImages, name: str) -> Any:
    found = getattr(module, name, None)
    return found if found is not None else getattr(images._dataset, name, None)
