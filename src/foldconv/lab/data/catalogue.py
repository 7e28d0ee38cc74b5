"""`create_data`: which set a name or a path means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError, unknown
from ..importing import names_code
from .arrays import digits, image_data
from .augmentation import check_augmentation, check_for_folders_only, image_options
from .folders import folder_data
from .image_data import ImageData
from .modules import module_data
from .named import NAMED, read_named
from .npz import read_npz


def create_data(
    name: str,
    *,
    folder: str | os.PathLike[str] = "data",
    download: bool = True,
    image_size: int | None = None,
    augmentation: str = "default",
    augmentation_args: Mapping[str, Any] | None = None,
    corrupt_images: str = "error",
    holdout: bool | int = False,
    normalize: bool = True,
    split: float = 0.2,
) -> ImageData:
    """A data set by name or path; cheap to ask for again, but for folders, which are listed anew.

    Args:
        name: one of `list_data`; or the path of an .npz file (`read_npz`) or of a folder
            with train/ and val/, or with one folder per class (`folder_data`); or the ``module.path:ClassName`` of a
            `LightningDataModule` (`module_data`; its code runs). A test set is the official test split.
        folder: where sets lie, or are downloaded to. ``NAME.npz`` in it is taken before torchvision's files.
        download: whether a set that is not there may be fetched.
        image_size: height and width of the images; None leaves them as they are, and is 224 for
            folders, whose images may differ in size.
        augmentation: of training images: "default" (what is usual for the set), "none", "flip", "crop", "flip-crop";
            for folders also a policy as timm names them (RandAugment ``rand-m9-mstd0.5``, AutoAugment ``original`` or
            ``v0``, AugMix ``augmix-m3-w3``), behind a random crop and a flip.
        augmentation_args: for folders: ``color_jitter``, ``lighting``, ``random_erasing``, ``crop_scale``
            (`augmentation.ImageOptions`).
        corrupt_images: "error" raises at the first image that cannot be read or augmented; "skip" leaves it out, logs a
            warning, and counts it in `ImageData.images_skipped`.
        holdout: True tests on the last training images, as many as the test split has, and trains on those before;
            a number says how many. For named sets and .npz files.
        normalize: whether pixels are normalized to mean 0 and standard deviation 1 per channel; else they stay in
            [0, 1]. For named sets and .npz files.
        split: for a folder that has the classes' folders alone: the share of each class's images that is tested on.

    Raises:
        FileNotFoundError: no such file or folder.
        UnsupportedError: no such name (the nearest is given), or a set with something wrong in it.

    >>> data = create_data("digits")
    >>> len(data.train), len(data.test), data.train[0][0].shape
    (1437, 360, torch.Size([1, 8, 8]))
    """
    check_augmentation(augmentation)
    if corrupt_images not in ("error", "skip"):
        raise UnsupportedError(f"corrupt_images: expected one of error, skip, received {corrupt_images!r}")
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise UnsupportedError(f"image_size: expected a number of pixels ≥ 1, received {image_size!r}")
    given = augmentation_args or {}
    image = image_options(given, augmentation)
    if name == "digits" or name in NAMED or name.endswith(".npz") or names_code(name):
        check_for_folders_only(name, augmentation, given)
    if name in NAMED:
        arrays = read_named(name, folder, download, image_size)
        statistics = NAMED[name].mean, NAMED[name].std
        return image_data(name, arrays, augmentation, holdout, normalize, statistics)
    if name.endswith(".npz"):
        return image_data(name, read_npz(name, image_size), augmentation, holdout, normalize)
    if holdout or not normalize:
        which = "holdout" if holdout else "normalize"
        raise UnsupportedError(f"{name}: {which}: for MNIST, CIFAR and .npz files only; leave it out")
    if name == "digits":
        return digits(name, image_size, augmentation)
    if names_code(name):
        return module_data(name, folder, download, image_size)
    if Path(name).is_dir():
        return folder_data(name, image_size, augmentation, corrupt_images, image, split)
    if os.sep in name or "/" in name:
        remedy = "check the path, or name one of: " + ", ".join(list_data())
        raise FileNotFoundError(f"{name}: expected a folder with train/ and val/, found no such folder; {remedy}")
    path = "or a path (.npz, or a folder with train/ and val/)"
    raise UnsupportedError(f"{unknown('data set', name, list_data())}; {path}")


def list_data() -> list[str]:
    """The names of all data sets.

    >>> "digits" in list_data()
    True
    """
    return sorted(["digits", *NAMED])
