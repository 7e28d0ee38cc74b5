"""How an image file becomes what a network sees when it is evaluated: as plain values, which files carry, and done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, shown

INTERPOLATION = "bilinear"


def described(
    shape: Sequence[int], mean: Sequence[float] | None, std: Sequence[float] | None, resize: int | None = None
) -> dict[str, Any]:
    """The steps as plain values.

    Args:
        shape: channels, height and width of the input.
        mean, std: per channel, of pixels in [0, 1]; None: pixels stay there.
        resize: the shorter side before the middle is cut out; None: just as long as that takes.

    Example:
        >>> described((1, 8, 8), (0.5,), (0.5,))["size"]
        [8, 8]
    """
    channels, height, width = shape
    return {
        "channels": channels,
        "size": [height, width],
        "resize": resize,
        "interpolation": INTERPOLATION,
        "mean": list(mean) if mean is not None else [0.0] * channels,
        "std": list(std) if std is not None else [1.0] * channels,
    }


def expect_described(values: Any, path: Any) -> Mapping[str, Any]:
    """The values, if they are such steps.

    Raises:
        CheckpointError: naming what is not.
    """
    channels = values.get("channels") if isinstance(values, Mapping) else None
    if channels not in (1, 3):
        raise CheckpointError(f"{path}: preprocessing: expected one of 1 or 3 channels, received {shown(values)}")
    size, resize = values.get("size"), values.get("resize")
    sizes = size if isinstance(size, list) and len(size) == 2 else [None]
    if not all(type(n) is int and 0 < n < 2**15 for n in [*sizes, *([] if resize is None else [resize])]):
        raise CheckpointError(f"{path}: preprocessing: expected sizes in pixels, received {shown([size, resize])}")
    if values.get("interpolation") != INTERPOLATION:
        received = shown(values.get("interpolation"))
        raise CheckpointError(f"{path}: preprocessing: expected {INTERPOLATION} interpolation, received {received}")
    for name in ("mean", "std"):
        given: Any = values.get(name)
        numbers = isinstance(given, list) and all(isinstance(n, (int, float)) and math.isfinite(n) for n in given)
        if not numbers or len(given) != channels or (name == "std" and 0 in given):
            raise CheckpointError(
                f"{path}: preprocessing: {name}: expected {channels} numbers, received {shown(given)}"
            )
    return values


def prepare(image: Any, steps: Mapping[str, Any]) -> Tensor:
    """An image as the network sees it, ``(1, C, H, W)``.

    Args:
        image: of PIL, RGB.
        steps: what `described` gives.

    Example:
        >>> from PIL import Image
        >>> steps = described((1, 8, 8), (0.5,), (0.5,))
        >>> prepare(Image.new("RGB", (16, 20), "white"), steps).unique()
        tensor([1.])
    """
    from torchvision.transforms import v2

    height, width = steps["size"]
    covers = max(height / image.height, width / image.width)
    shorter = steps["resize"] or math.ceil(min(image.size) * covers - 1e-9)
    grey = [v2.Grayscale()] if steps["channels"] == 1 else []
    pixels = v2.Compose([*grey, v2.Resize(shorter), v2.CenterCrop((height, width)), v2.PILToTensor()])(image)
    mean, std = (torch.tensor(steps[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return ((pixels.float() / 255 - mean) / std).unsqueeze(0)
