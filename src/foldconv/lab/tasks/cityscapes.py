"""Folders as Cityscapes has them: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelIds.png."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import UnsupportedError, shown, unknown
from ..data import BatchTransform, ImageData
from ..data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from ..data.folders import read_rgb, size_of

CLASSES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation")
CLASSES += ("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
"""The 19 classes that are evaluated, in the order of their numbers."""
_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""What masks call these classes, in the same order; the other ids up to 33 are not evaluated."""
IGNORED = 255
_EVALUATED_AT_ONCE = 2**21
"""Pixels: one image of Cityscapes."""

PALETTE: tuple[tuple[int, int, int], ...] = (
    *((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30)),
    *((220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142)),
    *((0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
)
"""Cityscapes' own colours of the 19 classes."""


def _table() -> np.ndarray:
    table = np.full(256, IGNORED, dtype=np.uint8)
    table[list(_IDS)] = np.arange(len(_IDS))
    return table


@dataclasses.dataclass(frozen=True)
class CropOptions:
    """What happens to an image in training: resized by a random factor, cut, mirrored.

    Args:
        crop: height and width of what is cut out; None: the first image's size.
        scale: least and largest factor.
        flip: whether every second image is mirrored.
    """

    crop: tuple[int, int] | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True


def crop_options(given: Mapping[str, Any], augmentation: str) -> CropOptions:
    """The options of a `TrainConfig`'s ``augmentation`` and ``augmentation_args``.

    Raises:
        UnsupportedError: unknown ones, or values that are none.

    >>> crop_options({"crop": [512, 1024]}, "default")
    CropOptions(crop=(512, 1024), scale=(0.5, 2.0), flip=True)
    """
    kinds = ("default", "none", "flip", "crop")
    if augmentation not in kinds:
        raise UnsupportedError(f"augmentation: expected one of {', '.join(kinds)}, received {augmentation!r}")
    fields = [field.name for field in dataclasses.fields(CropOptions)]
    for key in given:
        if key not in fields:
            raise UnsupportedError(f"augmentation_args: {unknown('option', key, fields)}")
    found: dict[str, Any] = {"flip": augmentation in ("default", "flip")}
    found["scale"] = (0.5, 2.0) if augmentation in ("default", "crop") else (1.0, 1.0)
    for key, kind, least in (("crop", int, 1), ("scale", (int, float), 1e-3)):
        if key in given:
            value = given[key]
            numbers = isinstance(value, list | tuple) and len(value) == 2
            if not (numbers and all(isinstance(n, kind) and not isinstance(n, bool) and n >= least for n in value)):
                raise UnsupportedError(f"augmentation_args: {key}: expected two numbers, received {shown(value)}")
            found[key] = tuple(value)
    if found["scale"][0] > found["scale"][1]:
        raise UnsupportedError(f"augmentation_args: scale: expected [least, largest], received {list(found['scale'])}")
    if "flip" in given:
        if not isinstance(given["flip"], bool):
            raise UnsupportedError(f"augmentation_args: flip: expected true or false, received {shown(given['flip'])}")
        found["flip"] = given["flip"]
    return CropOptions(**found)


class Masked(Dataset):
    """Images (uint8, 3×H×W) and their masks (int64, H×W) of the 19 classes and `IGNORED`.

    Args:
        files: of images and masks.
        size: of the shorter side, which images are resized to; None: as they are.
        options: the training's changes; None for evaluation.
    """

    def __init__(self, files: list[tuple[str, str]], size: int | None, options: CropOptions | None):
        self._files, self._size, self._options, self._classes = files, size, options, _table()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pair(index)
        if self._size is not None:
            image, mask = resized(image, mask, self._size / min(image.shape[1:]))
        if self._options is not None:
            image, mask = _changed(image, mask, self._options)
        return image, mask.long()

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Image and mask as the files have them.

        Raises:
            UnsupportedError: naming the file that is none, of another size than its image, or with other ids.
        """
        from PIL import Image

        path, truth = self._files[index]
        image = _pixels(path)
        try:
            with Image.open(truth) as file:
                if file.mode not in ("L", "P", "I;16", "I"):
                    raise ValueError(f"an image of mode {file.mode}")
                ids = np.asarray(file)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UnsupportedError(f"{truth}: expected a mask, one id per pixel, received {reason}") from None
        if ids.shape != image.shape[1:]:
            expected = "expected the size of its image, {}×{}".format(*image.shape[1:])
            received = "received {}×{}".format(*ids.shape)
            raise UnsupportedError(f"{truth}: {expected}, {received}; pair each image with its own mask")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= max(_IDS):
            wrong = int(ids.max()) if int(ids.max()) > max(_IDS) else int(ids.min())
            raise UnsupportedError(
                f"{truth}: expected ids from 0 to {max(_IDS)}, as in Cityscapes' labelIds, received {wrong}; "
                "use the files that end in _gtFine_labelIds.png"
            )
        return image, torch.from_numpy(self._classes[ids])


def _pixels(path: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(read_rgb(path))).permute(2, 0, 1).contiguous()
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from None


def resized(image: Tensor, mask: Tensor | None, factor: float) -> tuple[Tensor, Any]:
    """An image (uint8, 3×H×W) and its mask (H×W) at a multiple of their size.

    >>> [tuple(each.shape) for each in resized(torch.zeros(3, 8, 16).byte(), torch.zeros(8, 16), 0.5)]
    [(3, 4, 8), (4, 8)]
    """
    from torchvision.transforms.v2 import functional as F

    size = [max(1, round(side * factor)) for side in image.shape[1:]]
    if size == list(image.shape[1:]):
        return image, mask
    nearest = F.InterpolationMode.NEAREST_EXACT
    image = F.resize(image, size, antialias=True)
    return image, None if mask is None else F.resize(mask[None], size, interpolation=nearest)[0]


def _changed(image: Tensor, mask: Tensor, options: CropOptions) -> tuple[Tensor, Tensor]:
    """Scaled, cut (with black and ignored pixels where the image ends), mirrored; torch's generator draws."""
    least, largest = options.scale
    factor, flip, top, left = torch.rand(4).tolist()
    image, mask = resized(image, mask, least + (largest - least) * factor)
    height, width = options.crop or image.shape[1:]
    missing = (0, max(0, width - image.shape[2]), 0, max(0, height - image.shape[1]))
    image = torch.nn.functional.pad(image, missing)
    mask = torch.nn.functional.pad(mask, missing, value=IGNORED)
    y, x = int(top * (image.shape[1] - height + 1)), int(left * (image.shape[2] - width + 1))
    image, mask = image[:, y : y + height, x : x + width], mask[y : y + height, x : x + width]
    if options.flip and flip < 0.5:
        image, mask = image.flip(2), mask.flip(1)
    return image.contiguous(), mask.contiguous()


def cityscapes_data(path: str, image_size: int | None, options: CropOptions) -> ImageData:
    """The set in a folder: trained on the split train, tested on val.

    Args:
        path: of the folder that has leftImg8bit/ and gtFine/.
        image_size: the shorter side that images are resized to; None: as they are.
        options: what training changes.

    Raises:
        UnsupportedError: no such folder, a split without images, an image without a mask or the other way round.
    """
    train, test = (_files(path, split) for split in ("train", "val"))
    sizes = {size_of(image) for image, _ in test}
    height, width = size_of(train[0][0])
    factor = 1.0 if image_size is None else image_size / min(height, width)
    crop = options.crop or (round(height * factor), round(width * factor))
    largest = max(height * width for height, width in sizes)
    if image_size is not None:
        largest = max(round(h * w * (image_size / min(h, w)) ** 2) for h, w in sizes)
    together = 1 if len(sizes) > 1 else max(1, min(64, _EVALUATED_AT_ONCE // largest))
    return ImageData(
        path,
        Masked(train, image_size, dataclasses.replace(options, crop=crop)),
        Masked(test, image_size, None),
        len(CLASSES),
        (3, *crop),
        CLASSES,
        BatchTransform(IMAGENET_MEAN, IMAGENET_STD),
        evaluation_batch=together,
    )


def _files(path: str, split: str) -> list[tuple[str, str]]:
    """Each image of a split with its mask, by city and name."""
    images, truths = Path(path, "leftImg8bit", split), Path(path, "gtFine", split)
    for folder in (images, truths):
        if not folder.is_dir():
            raise UnsupportedError(
                f"{folder}: expected a folder as Cityscapes has it (leftImg8bit/ and gtFine/, each with train/ and "
                "val/), found none; arrange the images so, or name another folder"
            )
    end, mask_end = "_leftImg8bit.png", "_gtFine_labelIds.png"
    found = {key(path, images, end): str(path) for path in sorted(images.glob(f"*/*{end}"))}
    masks = {key(path, truths, mask_end): str(path) for path in sorted(truths.glob(f"*/*{mask_end}"))}
    if not found:
        raise UnsupportedError(f"{images}: expected images CITY/NAME{end}, found none; this split is empty")
    for name in sorted(found.keys() ^ masks.keys()):
        has, lacks = (found[name], "mask") if name in found else (masks[name], "image")
        other = truths / f"{name}{mask_end}" if name in found else images / f"{name}{end}"
        raise UnsupportedError(f"{has}: expected its {lacks} at {other}, found none; add it, or remove this file")
    return [(found[name], masks[name]) for name in sorted(found)]


def key(path: Path, folder: Path, end: str) -> str:
    """What an image and its mask have in common.

    >>> key(Path("gtFine/val/ulm/a_gtFine_labelIds.png"), Path("gtFine/val"), "_gtFine_labelIds.png")
    'ulm/a'
    """
    return os.fspath(path.relative_to(folder).as_posix()).removesuffix(end)
