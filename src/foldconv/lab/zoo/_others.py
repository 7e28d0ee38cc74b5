"""Other libraries' networks, built with a word of ours: torchvision's detectors, segmentation_models_pytorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...errors import UnsupportedError, unknown


def sized_detector(builder: Callable[..., nn.Module], *, image_size: int | None = None, **options: Any) -> nn.Module:
    """A detector of torchvision that resizes its images to a size of our choice.

    Args:
        builder: of torchvision.
        image_size: SSD's height and width; of others the shorter side, the longer at most 5/3 as long (1333/800).
        options: the builder's.
    """
    network: Any = builder(**options)
    if image_size is not None:
        resizing = network.transform
        resizing.min_size, resizing.max_size = (image_size,), round(image_size * 1333 / 800)
        if resizing.fixed_size is not None:
            resizing.fixed_size = (image_size, image_size)
    return network


def smp_kind(name: str) -> Callable[..., nn.Module]:
    """The class of segmentation_models_pytorch with a name, in lower case.

    Raises:
        UnsupportedError: the library is not installed, or has no such class.
    """
    try:
        from segmentation_models_pytorch import MODEL_ARCHITECTURES_MAPPING as KINDS  # pyright: ignore[reportMissingImports]
    except ImportError:
        remedy = "pip install segmentation-models-pytorch"
        raise UnsupportedError(
            f"architecture 'smp/{name}' needs segmentation_models_pytorch; install it: {remedy}"
        ) from None
    if name.lower() not in KINDS:
        raise UnsupportedError(unknown("architecture of segmentation_models_pytorch", name, sorted(KINDS)))
    return KINDS[name.lower()]


def smp_network(kind: Callable[..., nn.Module], *, num_classes: int = 1, **options: Any) -> nn.Module:
    """A network with so many classes, whose encoder starts untrained unless it is told."""
    return kind(**{"encoder_weights": None, **options}, classes=num_classes)
