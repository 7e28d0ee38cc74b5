"""Images that a network is looked at or calibrated with: some of those that it was trained on, without augmentation."""

from __future__ import annotations

import argparse
from typing import Any

from ._common import Parser, count


def add_calibration(
    parser: Parser, data: str = "data set whose training images are used (default: that of training)"
) -> None:
    """Which images, and how many."""
    group = parser.add_argument_group("calibration")
    group.add_argument("--calibration", metavar="DATA", help=data)
    group.add_argument("--images", metavar="N", type=count, default=256, help="how many of them (default: 256)")
    group.add_argument("--data-folder", metavar="FOLDER", help="where data sets lie (default: the run's, or data)")
    group.add_argument("--no-download", action="store_true", help="never download a data set that is not there")


def calibration_images(options: argparse.Namespace, subject: str, description: dict[str, Any]) -> list[Any]:
    """Batches of training images, drawn by a fixed seed, as the network sees them in evaluation.

    Raises:
        CheckpointError: as `calibration_data`.
    """
    return training_images(calibration_data(options, subject, description), options.images)


def calibration_data(options: argparse.Namespace, subject: str, description: dict[str, Any]) -> Any:
    """The data set, opened as in training, without augmentation.

    Raises:
        CheckpointError: nobody says which data, or the file names a module as its data, whose code would run.
    """
    from ...errors import CheckpointError
    from ..importing import names_code
    from ..train.config import TrainConfig
    from ._eval import data_options

    if (task := description.get("task", "classification")) != "classification":
        raise CheckpointError(f"{subject}: {task}: only classifiers are looked at on the images of a data set")
    name = options.calibration or description.get("data")
    if name is None:
        raise CheckpointError(f"{subject}: does not say what it was trained on; name data with --calibration")
    given = {"data": options.calibration, "image_size": None, "corrupt_images": None, "holdout": None}
    asked = argparse.Namespace(**given, normalize=None, checkpoint=subject)
    asked.data_folder, asked.no_download = options.data_folder, options.no_download
    if not isinstance(name, str) or (options.calibration is None and names_code(name)):
        raise CheckpointError(
            f"{subject}: names {name!r} as its data, whose code would run; if you trust it, give --calibration"
        )
    augmentation = "default" if names_code(name) else "none"
    return TrainConfig(data=name, augmentation=augmentation, **data_options(asked, description)).open_data()


def training_images(data: Any, count: int) -> list[Any]:
    """Batches of so many training images, drawn by a fixed seed."""
    from ..data import training_loader

    found, missing = [], count
    for images, _ in training_loader(data, min(64, max(2, missing)), seed=0, epoch=lambda: 0):
        found.append(images[:missing])
        missing -= len(found[-1])
        if not missing:
            break
    return found
