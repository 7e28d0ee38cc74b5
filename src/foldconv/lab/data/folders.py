"""Folders with one folder per class, in train/ and val/ as ImageNet has them or not: read image by image by workers."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...errors import UnsupportedError
from .augmentation import IMAGENET_MEAN, IMAGENET_STD, ImageOptions, Steps, image_transform
from .image_data import ImageData
from .preprocessing import described
from .transforms import BatchTransform

CROP_SHARE = 0.875
"""Of the resized image's side that evaluation sees: 224 of 256."""
DEFAULT_SIZE = 224
_EVALUATION_FOLDERS = ("val", "valid", "validation", "test")
_IN_A_ROW = 1000
"""So many images that cannot be read, one after the other, are no exceptions any more."""
_THINNEST = 200
"""So many times as long as wide an image may be: resized, one of 1×60000 pixels would take 16 GB."""
_NO_CLASSES = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders that systems put beside the user's own, as are those whose name begins with a dot."""
_LOG = logging.getLogger(__name__)


class FolderImages(Dataset):
    """Images of one split: RGB, uint8 (3, S, S), and their class.

    Args:
        files: path and class of each image.
        transform: from a PIL image to uint8 (3, S, S).
        substitute: for training, the next image takes the place of one that cannot be read or transformed, so that
            batches keep their size; else it is missing from its batch.
        skip: whether to go on after such an image.
    """

    def __init__(self, files: list[tuple[str, int]], transform: Callable[[Any], Any], substitute: bool, skip: bool):
        self._files, self._transform, self._substitute, self._skip = files, transform, substitute, skip

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample, unread = self.read(index)
        if sample is None:
            raise UnsupportedError(": ".join(unread[-1][:2]))
        return sample

    def read(self, index: int) -> tuple[tuple[torch.Tensor, int] | None, list[tuple[str, str, bool]]]:
        """A sample, and path, reason and whether it ends the run, of what could not be read on the way to it."""
        unread: list[tuple[str, str, bool]] = []
        instead = self._substitute and self._skip
        for attempt in range(min(len(self), _IN_A_ROW) if instead else 1):
            path, label = self._files[(index + attempt) % len(self)]
            try:
                return (self._transform(read_rgb(path)), label), unread
            except UnsupportedError as error:
                remedy = "" if self._skip else "; replace it, or leave such images out with corrupt_images: skip"
                unread.append((_shown(path), f"{error}{remedy}", not self._skip))
        if instead:
            last, reason, _ = unread[-1]
            unread.append((last, f"{reason}; nor can the {len(unread) - 1} images before it be used", True))
        return None, unread


def read_rgb(path: Any) -> Any:
    """An image file as a PIL image of 8 bits, RGB, upright as its EXIF orientation says.

    Grey, 1-bit, palette and CMYK images are converted. A grey level v of 16 bits becomes round(v / 257), so that white
    stays white; Pillow itself makes 8 bits of 16-bit colours. Transparency is dropped, and the colours below it are
    seen, as in torchvision and timm. Of several frames or pages the first is taken.

    Args:
        path: of the file, or an open one.

    Raises:
        UnsupportedError: not an image, a damaged one, one of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, one that
            is too thin to be resized, or one whose numbers have no known range (32 bits, floats, 12 bits).
    """
    from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, and without the file's name
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                deep = _has_16_bits(image)
                if image.mode[0] in "IF" and not deep:
                    raise ValueError(f"mode {image.mode}, whose black and white are not known; save it with 8 bits")
                if max(image.size) > _THINNEST * min(image.size):
                    raise ValueError("{}×{} pixels, too thin to be resized; cut it".format(*image.size))
                image.load()
                with contextlib.suppress(Exception):  # a damaged EXIF block damages no pixel
                    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                        image = ImageOps.exif_transpose(image)
                if deep:
                    levels = (np.asarray(image).astype(np.uint32) + 128) // 257
                    image = Image.fromarray(levels.astype(np.uint8))
                return image.convert("RGB")
    except Exception as error:  # decoders raise all kinds, for bytes that anybody may have written
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "a file of no known format" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedError(f"expected an image, received {reason}") from error


def size_of(path: Any) -> tuple[int, int]:
    """Height and width of what `read_rgb` gives, by the file's head alone.

    Raises:
        UnsupportedError: not an image; the message names the file.
    """
    from PIL import ExifTags, Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = False
            with contextlib.suppress(Exception):
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (width, height) if turned else (height, width)
    except Exception as error:
        raise UnsupportedError(f"{path}: expected an image, received {' '.join(str(error).split())}") from None


def _has_16_bits(image: Any) -> bool:
    """Whether these are grey levels from 0, black, to 65535; Pillow has had several modes for them."""
    if image.format == "TIFF":  # bits per sample, and which end is black
        return image.mode.startswith("I;16") and (image.tag_v2.get(258), image.tag_v2.get(262)) == ((16,), 1)
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _shown(path: str) -> str:
    """A path for a message of one line."""
    return path if path.isprintable() else repr(path)[1:-1]


def folder_data(
    path: str,
    image_size: int | None,
    augmentation: str,
    corrupt_images: str,
    options: ImageOptions,
    split: float = 0.2,
) -> ImageData:
    """The set in a folder.

    Where the folder has no train/, but the classes themselves, each class's images are split in two, by chance, but
    always the same for the same files.

    Training: RandomResizedCrop and a flip ("crop" and "flip" are one of them, "none" is what evaluation does), with a
    policy of timm behind them if `augmentation` names one, then what `options` say. Evaluation: the shorter side to
    8/7 of the size, then the middle. Files with torchvision's endings (.jpg, .png, .tif, ...) are images (`read_rgb`),
    also in folders below a class's; what begins with a dot is nothing. A folder is listed whenever this is called.

    Args:
        path: of the folder that has train/ and val/ (or valid/, validation/, test/), or one folder per class.
        image_size: None is 224, since images of a folder may differ in size.
        augmentation: one of `AUGMENTATIONS`, or a policy of timm.
        corrupt_images: "error" or "skip".
        options: colours, erasing, the crop's area.
        split: the share of each class's images that is tested on where the folder has no splits.

    Raises:
        UnsupportedError: a split or the images of a class are missing, or the splits have other classes.
    """
    from torchvision import transforms

    others: Counter[str] = Counter()
    classes, train, test, note = _splits(path, split, others)
    size = image_size or DEFAULT_SIZE
    middle = [transforms.Resize(round(size / CROP_SHARE)), transforms.CenterCrop(size)]
    skip = corrupt_images == "skip"
    return ImageData(
        path,
        FolderImages(train, image_transform(size, augmentation, options, middle), substitute=True, skip=skip),
        FolderImages(test, Steps([*middle, transforms.PILToTensor()]), substitute=False, skip=skip),
        len(classes),
        (3, size, size),
        tuple(classes),
        BatchTransform(IMAGENET_MEAN, IMAGENET_STD),
        described((3, size, size), IMAGENET_MEAN, IMAGENET_STD, round(size / CROP_SHARE)),
        note="; ".join(filter(None, [note, _passed_over(path, others)])),
    )


_Files = list[tuple[str, int]]


def _splits(path: str, share: float, others: Counter[str]) -> tuple[list[str], _Files, _Files, str]:
    """Classes, training and test images, and how they were split where the folder does not say."""
    evaluation = next((split for split in _EVALUATION_FOLDERS if Path(path, split).is_dir()), None)
    if evaluation is None and _holds_classes(path):
        classes, files = _files(path, others)
        train, test = _split(path, classes, files, share)
        note = f"{_shown(path)}: no train/ and val/: of {len(files)} images in {len(classes)} classes, {len(test)} test"
        return classes, train, test, f"{note} (split: {share:g} of each class, always the same)"
    if evaluation is None or not Path(path, "train").is_dir():
        has = ", ".join([_shown(each.name) for each in _entries(path)][:8]) or "nothing"
        expected = "expected the folders train/ and val/ with one folder per class, or folders of images alone"
        raise UnsupportedError(f"{path}: {expected}, found {has}; arrange the images so, or name another folder")
    (classes, train), (test_classes, test) = (
        _files(os.path.join(path, each), others) for each in ("train", evaluation)
    )
    if classes != test_classes:
        other = sorted(set(classes) ^ set(test_classes))
        where = ", ".join(f"{_shown(each)} ({'train' if each in classes else evaluation} only)" for each in other[:3])
        remedy = "give both splits the same class folders"
        raise UnsupportedError(
            f"{path}: expected the same classes in train/ and {evaluation}/, found {where}; {remedy}"
        )
    return classes, train, test, ""


def _holds_classes(path: str) -> bool:
    """Whether all folders in it hold images, none of them being train/ with folders of its own."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    folders = [each for each in _entries(path) if each.is_dir()]
    return len(folders) > 1 and all(
        any(each.name.lower().endswith(IMG_EXTENSIONS) for each in _entries(folder.path)) for folder in folders
    )


def _split(path: str, classes: list[str], files: _Files, share: float) -> tuple[_Files, _Files]:
    """Training and test images, each class in the same proportion, each split in the order of the files."""
    generator = torch.Generator().manual_seed(0)
    tested: set[int] = set()
    for label, name in enumerate(classes):
        own = [index for index, (_, each) in enumerate(files) if each == label]
        if len(own) < 2:
            raise UnsupportedError(
                f"{_shown(path)}: expected two images at least of each class to split, found one of {_shown(name)}; "
                "add images, or arrange them in train/ and val/"
            )
        number = min(max(round(share * len(own)), 1), len(own) - 1)
        tested |= {own[index] for index in torch.randperm(len(own), generator=generator)[:number].tolist()}
    parts = ([file for index, file in enumerate(files) if (index in tested) == test] for test in (False, True))
    train, test = parts
    return train, test


def _files(path: str, others: Counter[str]) -> tuple[list[str], list[tuple[str, int]]]:
    """Classes, and path and class of all images, in the order of torchvision's ImageFolder."""
    classes = [each.name for each in _entries(path) if each.is_dir()]
    if not classes:
        raise UnsupportedError(f"{_shown(path)}: expected one folder per class, found none; make them")
    above = (os.path.join(os.path.realpath(path), ""),)
    images = [sorted(_images(os.path.join(path, each), above, others), key=os.path.split) for each in classes]
    empty = [_shown(each) for each, found in zip(classes, images) if not found]
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        expected = f"expected images in each class folder, found none in {', '.join(empty[:3])}{more}"
        raise UnsupportedError(f"{_shown(path)}: {expected}; add images, or remove the folder in each split")
    return classes, [(file, label) for label, found in enumerate(images) for file in found]


def image_files(folder: str) -> list[str]:
    """Paths of the images in a folder and in those below, sorted; a line is logged of files with other endings."""
    others: Counter[str] = Counter()
    files = sorted(_images(folder, (), others), key=os.path.split)
    if others:
        _LOG.warning("%s", _passed_over(folder, others))
    return files


def _passed_over(folder: str, others: Counter[str]) -> str:
    """What of a folder was not read; nothing where all was."""
    if not others:
        return ""
    kinds = ", ".join(f"{number} {ending}" for ending, number in others.most_common(4))
    more = ", ..." if len(others) > 4 else ""
    return f"{_shown(folder)}: passed over what is not called an image: {kinds}{more}; photos among them: save as .jpg"


def _images(folder: str, above: tuple[str, ...], others: Counter[str]) -> Iterator[str]:
    """Paths of the images in a folder and in those below; a link that leads back up is not followed.

    `others` counts the endings of what is none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    real = os.path.join(os.path.realpath(folder), "")
    if any(each.startswith(real) for each in above):
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _images(entry.path, (*above, real), others)
        elif not (entry.is_file() or entry.is_symlink()):
            continue
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            yield entry.path
        else:
            others[_shown(os.path.splitext(entry.name)[1].lower()) or "without ending"] += 1


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What a user put into a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            own = [each for each in entries if each.name[0] != "." and each.name not in _NO_CLASSES]
    except OSError as error:
        raise UnsupportedError(f"{_shown(folder)}: expected a folder to read, received: {error.strerror}") from error
    return sorted(own, key=lambda each: each.name)
