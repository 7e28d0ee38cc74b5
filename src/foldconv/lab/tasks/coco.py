"""Folders as COCO has them: annotations/instances_train*.json and instances_val*.json, and the images beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import UnsupportedError, shown
from ..data import BatchTransform, ImageData
from ..data.folders import read_rgb, size_of

Target = dict[str, Tensor]
Size = tuple[int, int]
_SKIP = "correct it, or leave such boxes out with corrupt_images: skip"


class Boxed(Dataset):
    """Images (uint8, 3×H×W) and what is on them: boxes (x1, y1, x2, y2) in pixels, labels from 1, iscrowd, area.

    Args:
        images: for each its file, its targets, and the (height, width) that these are of, None where that is not said.
        flip: mirror every second image, by chance: in training.
        crowds: keep what COCO marks as crowds: in evaluation, which does not count what is found there.
    """

    def __init__(self, images: list[tuple[str, Target, Size | None]], flip: bool, crowds: bool):
        self._images, self._flip, self._crowds = images, flip, crowds

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        path, target, size = self._images[index]
        try:
            image = torch.from_numpy(np.array(read_rgb(path))).permute(2, 0, 1).contiguous()
        except UnsupportedError as error:
            raise UnsupportedError(f"{path}: {error}") from None
        if size not in (None, tuple(image.shape[1:])):  # boxes would lie elsewhere
            height, width = image.shape[1:]
            raise UnsupportedError(
                f"{path}: is {width}×{height} upright, as its EXIF orientation says, and its annotations are of an "
                f"image of {size[1]}×{size[0]}; store the pixels as they are annotated, or correct the annotations"
            )
        if not self._crowds:
            kept = target["iscrowd"] == 0
            target = {name: values[kept] for name, values in target.items()}
        if self._flip and torch.rand(()) < 0.5:
            x1, y1, x2, y2 = target["boxes"].unbind(1)
            width = image.shape[2]
            image, target = image.flip(2), target | {"boxes": torch.stack([width - x2, y1, width - x1, y2], 1)}
        return image, target

    @staticmethod
    def collate(samples: list[tuple[Tensor, Target]]) -> list[Any]:
        """Images differ in size, so that a batch is a list of them, and one of targets."""
        return [[image for image, _ in samples], [target for _, target in samples]]


def coco_data(path: str, flip: bool, skip: bool) -> ImageData:
    """The set in a folder: trained on the split train, tested on val.

    Args:
        path: of the folder that has annotations/; the images of a split lie in a folder of the split's name, such as
            train2017/, beside it or in images/.
        flip: whether training mirrors images.
        skip: leave out boxes without an area.

    Raises:
        UnsupportedError: no such folder, a split without images or boxes, splits of other classes, or annotations that
            are wrong.
    """
    (classes, train), (test_classes, test) = (_split(path, split, skip) for split in ("train", "val"))
    if classes != test_classes:
        other = sorted({*classes.items()} ^ {*test_classes.items()})
        raise UnsupportedError(f"{path}: expected the same categories in train and val, only one has {other[0]}")
    numbers = {category: label for label, category in enumerate(sorted(classes), start=1)}
    names = ("background", *(classes[category] for category in numbers))
    splits = [[(file, _target(rows, numbers), size) for file, rows, size in found] for found in (train, test)]
    height, width = size_of(splits[0][0][0])
    return ImageData(
        path,
        Boxed(splits[0], flip, crowds=False),
        Boxed(splits[1], flip=False, crowds=True),
        len(names),
        (3, height, width),
        names,
        BatchTransform((0.0,) * 3, (1.0,) * 3),  # [0, 1]; the network normalizes
        evaluation_batch=8,
    )


def _target(rows: list[dict[str, Any]], numbers: Mapping[int, int]) -> Target:
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    areas = [row.get("area", row["bbox"][2] * row["bbox"][3]) for row in rows]
    return {
        "boxes": boxes,
        "labels": torch.tensor([numbers[row["category_id"]] for row in rows], dtype=torch.int64),
        "iscrowd": torch.tensor([int(row.get("iscrowd", 0)) for row in rows], dtype=torch.int64),
        "area": torch.tensor(areas, dtype=torch.float32),
    }


def _split(path: str, split: str, skip: bool) -> tuple[dict[int, str], list[tuple[str, list[Any], Size | None]]]:
    """Categories by their id, and each image's file, annotations and recorded size."""
    files = sorted(Path(path, "annotations").glob(f"instances_{split}*.json"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        where = f"{path}: expected one file annotations/instances_{split}*.json, as COCO has it, found {found}"
        raise UnsupportedError(f"{where}; arrange the data so, or name another folder")
    file = files[0]
    name = file.stem.removeprefix("instances_")
    folder = next((each for each in (Path(path, name), Path(path, "images", name)) if each.is_dir()), None)
    if folder is None:
        raise UnsupportedError(
            f"{path}: expected the images of {file.name} in {name}/ or images/{name}/, found neither"
        )
    try:
        content = json.loads(file.read_bytes())
        images, rows, categories = (list(content[part]) for part in ("images", "annotations", "categories"))
        classes = {int(each["id"]): str(each["name"]) for each in categories}
        named = {each["id"]: each for each in images}
        found = {identity: (each["file_name"], [], _recorded(each)) for identity, each in named.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise UnsupportedError(
            f"{file}: expected images, annotations and categories as COCO has them: {reason}"
        ) from None
    if not images:
        raise UnsupportedError(f"{file}: expected images, found none; this split is empty")
    for row in rows:
        if not isinstance(row, dict):
            raise UnsupportedError(f"{file}: expected each annotation to be a mapping, received {shown(row)}")
        if _checked(row, file, classes, named, skip):
            found[row["image_id"]][1].append(row)
    if not any(rows for _, rows, _ in found.values()):
        raise UnsupportedError(f"{file}: expected boxes, found none; there is nothing to learn or to measure")
    listed = []
    for name, rows, size in found.values():
        if not isinstance(name, str) or not (folder / name).is_file():
            raise UnsupportedError(f"{file}: lists {shown(name)}, which is not in {folder}; add it, or list it no more")
        listed.append((str(folder / name), rows, size))
    return classes, listed


def _recorded(image: Mapping[str, Any]) -> Size | None:
    size = image.get("height"), image.get("width")
    return size if all(isinstance(n, int) for n in size) else None  # pyright: ignore[reportReturnType]


def _checked(row: dict[str, Any], file: Path, classes: Any, named: Any, skip: bool) -> bool:
    """Whether an annotation is of use; raises where something is wrong with it."""
    which = f"{file}: annotation {shown(row.get('id'))}"
    image = row.get("image_id")
    if not isinstance(image, int | str) or image not in named:
        raise UnsupportedError(f"{which}: its image {shown(image)} is not among the images; list it, or remove this")
    category = row.get("category_id")
    if not isinstance(category, int) or category not in classes:
        known = ", ".join(map(str, sorted(classes)[:8])) + (", ..." if len(classes) > 8 else "")
        raise UnsupportedError(f"{which}: expected a category among {known}, received {shown(category)}")
    box: Any = row.get("bbox")
    numbers = isinstance(box, list) and len(box) == 4
    if not (numbers and all(isinstance(n, int | float) and math.isfinite(n) for n in box)):
        raise UnsupportedError(f"{which}: expected a box [x, y, width, height], received {shown(box)}")
    if box[2] <= 0 or box[3] <= 0:
        if skip:
            return False
        raise UnsupportedError(f"{which}: expected a box with an area, received {shown(box)}; {_SKIP}")
    height, width = named[image].get("height", math.inf), named[image].get("width", math.inf)
    if box[0] >= width or box[1] >= height or box[0] + box[2] <= 0 or box[1] + box[3] <= 0:
        if skip:
            return False
        raise UnsupportedError(f"{which}: its box {shown(box)} lies outside its image of {width}×{height}; {_SKIP}")
    return True
