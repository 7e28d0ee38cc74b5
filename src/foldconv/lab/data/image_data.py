"""`ImageData`: what a data set is to the rest of the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from .transforms import BatchTransform


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Images and labels (int64), split for training and testing.

    A `TensorDataset` lives on the device that trains, as float32 or as uint8; any other map-style dataset is read by
    worker processes. The loaders apply `transform` to whole batches of either, and give float32, channels first.

    >>> import foldconv
    >>> data = foldconv.train.create_data("digits")
    >>> data.num_classes, data.input_shape, data.images_skipped
    (10, (1, 8, 8), 0)
    """

    name: str
    """What `create_data` was given."""
    train: Dataset
    test: Dataset
    num_classes: int
    input_shape: tuple[int, int, int]
    """Channels, height, width."""
    classes: tuple[str, ...] | None = None
    """Their names, where the set tells them."""
    transform: BatchTransform = dataclasses.field(default_factory=BatchTransform)
    """Augmentation (training only) and normalization of a batch."""
    preprocessing: Mapping[str, Any] | None = None
    """How an image file becomes what the network sees in evaluation, where that is known; see preprocessing.py."""
    note: str = dataclasses.field(default="", compare=False)
    """What a user should know of how the set was made, in one line, or nothing."""
    skipped: set[str] = dataclasses.field(default_factory=set, compare=False)
    """Which images could not be read and were left out; grows while folders are read."""

    evaluation_batch: int | None = None
    """Test images that are evaluated at once; None: 256."""

    @property
    def images_skipped(self) -> int:
        """How many images could not be read so far."""
        return len(self.skipped)
