"""Folders as ImageNet has them, train/ and val/ with one folder per class: read image by image, in worker processes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ...errors import UnsupportedError
from .augmentation import IMAGENET_MEAN, IMAGENET_STD, ImageOptions, image_transform
from .image_data import ImageData
from .transforms import BatchTransform

CROP_SHARE = 0.875
"""Of the resized image's side that evaluation sees: 224 of 256."""
DEFAULT_SIZE = 224
_EVALUATION_FOLDERS = ("val", "test")


class FolderImages(Dataset):
    """Images of one split: RGB, uint8 (3, S, S), and their class.

    Args:
        files: path and class of each image.
        transform: from a PIL image to uint8 (3, S, S).
        substitute: for training, the next image takes the place of one that cannot be read, so that batches keep
            their size; else it is missing from its batch.
        skip: whether to go on after such an image.
    """

    def __init__(self, files: list[tuple[str, int]], transform: Callable[[Any], Any], substitute: bool, skip: bool):
        self._files, self._transform, self._substitute, self._skip = files, transform, substitute, skip

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample, unread = self.read(index)
        if sample is None or (unread and not self._skip):
            raise UnsupportedError(f"{unread[0][0]}: expected an image, received {unread[0][1]}")
        return sample

    def read(self, index: int) -> tuple[tuple[torch.Tensor, int] | None, list[tuple[str, str, bool]]]:
        """A sample, and path, reason and whether it ends the run, of what could not be read on the way to it."""
        from PIL import Image, UnidentifiedImageError

        unread: list[tuple[str, str, bool]] = []
        for attempt in range(len(self) if self._substitute and self._skip else 1):
            path, label = self._files[(index + attempt) % len(self)]
            try:
                with Image.open(path) as image:
                    pixels = image.convert("RGB")
            except Exception as error:  # decoders raise all kinds, for bytes that anybody may have written
                unknown = isinstance(error, UnidentifiedImageError)
                reason = "a file of no known format" if unknown else " ".join(str(error).split())
                unread.append((path, reason, not self._skip))
                continue
            return (self._transform(pixels), label), unread
        return None, unread


def folder_data(
    path: str,
    image_size: int | None,
    augmentation: str,
    corrupt_images: str,
    options: ImageOptions,
) -> ImageData:
    """The set in a folder.

    Training: RandomResizedCrop and a flip ("crop" and "flip" are one of them, "none" is what evaluation does), with a
    policy of timm behind them if `augmentation` names one, then what `options` say. Evaluation: the shorter side to
    8/7 of the size, then the middle.

    Args:
        path: of the folder that has train/ and val/ (or test/).
        image_size: 224 by default.
        augmentation: one of `AUGMENTATIONS`, or a policy of timm.
        corrupt_images: "error" or "skip".
        options: colours, erasing, the crop's area.

    Raises:
        UnsupportedError: a split or the images of a class are missing, or the splits have other classes.
    """
    from torchvision import transforms

    evaluation = next((split for split in _EVALUATION_FOLDERS if Path(path, split).is_dir()), None)
    if evaluation is None or not Path(path, "train").is_dir():
        has = ", ".join(sorted(each.name for each in Path(path).iterdir())[:8]) or "nothing"
        expected = "expected the folders train/ and val/ with one folder per class"
        raise UnsupportedError(f"{path}: {expected}, found {has}; arrange the images so, or name another folder")
    (classes, train), (test_classes, test) = (
        _files(os.path.join(path, split), os.stat(os.path.join(path, split)).st_mtime_ns)
        for split in ("train", evaluation)
    )
    if classes != test_classes:
        other = sorted(set(classes) ^ set(test_classes))
        where = ", ".join(f"{each} ({'train' if each in classes else evaluation} only)" for each in other[:3])
        remedy = "give both splits the same class folders"
        raise UnsupportedError(
            f"{path}: expected the same classes in train/ and {evaluation}/, found {where}; {remedy}"
        )
    size = image_size or DEFAULT_SIZE
    middle = [transforms.Resize(round(size / CROP_SHARE)), transforms.CenterCrop(size)]
    skip = corrupt_images == "skip"
    return ImageData(
        path,
        FolderImages(train, image_transform(size, augmentation, options, middle), substitute=True, skip=skip),
        FolderImages(test, transforms.Compose([*middle, transforms.PILToTensor()]), substitute=False, skip=skip),
        len(classes),
        (3, size, size),
        tuple(classes),
        BatchTransform(IMAGENET_MEAN, IMAGENET_STD),
    )


@functools.lru_cache(maxsize=4)
def _files(path: str, _modified: int) -> tuple[list[str], list[tuple[str, int]]]:
    """Classes, and path and class of all images; a large folder is listed once per process."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(path)
    except (FileNotFoundError, OSError) as error:
        empty = sorted(each.name for each in Path(path).iterdir() if each.is_dir() and not _has_image(each))
        if empty:
            more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
            expected = f"expected images in each class folder, found none in {', '.join(empty[:3])}{more}"
            raise UnsupportedError(f"{path}: {expected}; add images, or remove the folder in each split") from error
        reason = " ".join(str(error).split())
        raise UnsupportedError(f"{path}: expected one folder per class, received: {reason}; make them") from error
    return found.classes, found.samples


def _has_image(folder: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return any(file.lower().endswith(IMG_EXTENSIONS) for _, _, files in os.walk(folder) for file in files)
