"""Sets that fit into memory as one uint8 tensor: the embedded digits, .npz files, torchvision's MNIST and CIFAR."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from ...errors import UnsupportedError
from .image_data import ImageData
from .preprocessing import described
from .transforms import BatchTransform


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A set as it lies in memory: uint8 images (N, C, H, W), int64 labels (N,), both splits.

    Args:
        source: the file or folder, for messages.
    """

    source: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple[str, ...] | None = None


def image_data(
    name: str,
    arrays: Arrays,
    augmentation: str,
    holdout: bool | int,
    normalize: bool,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> ImageData:
    """The set for training: checked, held out, normalized.

    Args:
        name: what the set is called.
        arrays: the images.
        augmentation: one of `AUGMENTATIONS`; the default is "flip-crop" for colour images and "none" for grey ones.
        holdout: so many of the last training images are the test set, and are not trained on; True: as many as the
            test split has; False or 0: the test split.
        normalize: else pixels stay in [0, 1].
        statistics: published mean and standard deviation; by default those of the images that are trained on.

    Raises:
        UnsupportedError: labels out of range, or no image left to train on.
    """
    num_classes = check_labels(arrays)
    train, test = (arrays.train_images, arrays.train_labels), (arrays.test_images, arrays.test_labels)
    if holdout:
        count = len(test[1]) if holdout is True else holdout
        if count >= len(train[1]):
            received = f"received holdout={count} of {len(train[1])} training images"
            raise UnsupportedError(f"{name}: expected to hold out fewer images than there are, {received}")
        test = (train[0][-count:], train[1][-count:])
        train = (train[0][:-count], train[1][:-count])
    channels, height, width = train[0].shape[1:]
    mean, std = statistics or pixel_statistics(train[0]) if normalize else ((0.0,) * channels, (1.0,) * channels)
    if augmentation == "default":
        augmentation = "flip-crop" if channels == 3 else "none"
    transform = BatchTransform(
        mean,
        std,
        flip="flip" in augmentation,
        pad=max(1, height // 8) if "crop" in augmentation else 0,  # 4 for 32×32, as usual for CIFAR
    )
    return ImageData(
        name,
        TensorDataset(*train),
        TensorDataset(*test),
        num_classes,
        (channels, height, width),
        arrays.classes,
        transform,
        described((channels, height, width), transform.mean, transform.std),
    )


def check_labels(arrays: Arrays) -> int:
    """The number of classes: of their names, or one more than the highest label that is trained on."""
    known = len(arrays.classes) if arrays.classes else int(arrays.train_labels.max()) + 1
    for split, labels in (("train", arrays.train_labels), ("test", arrays.test_labels)):
        wrong = ((labels < 0) | (labels >= known)).nonzero().flatten()
        if len(wrong):
            first = int(wrong[0])
            expected = f"expected labels from 0 to {known - 1}, received {int(labels[first])} for image {first}"
            remedy = "number the classes from 0, and have all of them in the training split"
            raise UnsupportedError(f"{arrays.source}: y_{split}: {expected} ({len(wrong)} such labels); {remedy}")
    return known


def pixel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (N, C, H, W), as pixels in [0, 1].

    Counted per grey level, so exact; a channel without any contrast gets the standard deviation 1.

    >>> pixel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2))
    ((0.5,), (0.5,))
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = torch.zeros(256, dtype=torch.float64)
        for part in images[:, channel].split(8192):
            counts += torch.bincount(part.flatten(), minlength=256)
        share = counts / counts.sum()
        mean = float(share @ levels)
        means.append(mean)
        deviations.append(float(share @ (levels - mean) ** 2) ** 0.5 or 1.0)
    return tuple(means), tuple(deviations)


def resized(images: torch.Tensor, size: int | None) -> torch.Tensor:
    """Images (N, C, H, W) as squares of `size` pixels: the shorter side is scaled, the middle of the longer one kept.

    >>> resized(torch.zeros(2, 1, 8, 12, dtype=torch.uint8), 4).shape
    torch.Size([2, 1, 4, 4])
    """
    height, width = images.shape[2:]
    if size is None or (height, width) == (size, size):
        return images
    scale = size / min(height, width)
    shape = max(size, round(height * scale)), max(size, round(width * scale))
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    parts = [
        F.interpolate(part, shape, mode="bilinear", antialias=True)[..., top : top + size, left : left + size]
        for part in images.split(1024)
    ]
    return torch.cat(parts)


@functools.lru_cache(maxsize=1)
def _digits_tensors() -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(labels).long()
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return images, labels, list(train), list(test)


def digits(name: str, image_size: int | None, augmentation: str) -> ImageData:
    """scikit-learn's handwritten digits: 1797 scans of 8×8 pixels with 17 grey levels, a stratified fifth for testing.

    The split never depends on the seed of a run: accuracies of different runs are about the same images.
    """
    images, labels, train, test = _digits_tensors()
    images = resized(images, image_size)
    transform = BatchTransform(
        flip="flip" in augmentation, pad=max(1, images.shape[2] // 8) if "crop" in augmentation else 0, fill=-1.0
    )
    return ImageData(
        name,
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
        num_classes=10,
        input_shape=(1, images.shape[2], images.shape[3]),
        classes=tuple("0123456789"),
        transform=transform,
        # 17 grey levels, of which the middle one is 0.
        preprocessing=described((1, images.shape[2], images.shape[3]), (0.5,), (0.5,)),
    )
