"""Augmentation and normalization of whole batches, on the device they are on and without a loop over images."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

AUGMENTATIONS: tuple[str, ...] = ("default", "none", "flip", "crop", "flip-crop")
"""What `create_data` takes as `augmentation` for any set; "default" is what is usual for it."""


@dataclasses.dataclass(frozen=True)
class BatchTransform:
    """What happens to a batch of images between memory and network.

    Args:
        mean: per channel, of pixels in [0, 1]; None leaves images as they are (they are float32 then).
        std: the same for the standard deviation.
        flip: in training, mirror every second image, by chance, left to right.
        pad: in training, put so many pixels on each side, and cut a window of the old size at a random place.
        fill: the value of these pixels, as the images have it before normalization (black).

    >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    >>> BatchTransform(mean=(0.5,) * 3, std=(0.5,) * 3)(images).unique()
    tensor([-1.])
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flip: bool = False
    pad: int = 0
    fill: float = 0.0

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor | None:
        """The random choices for `count` images, (count, 3): mirrored, rows and columns cut; None if nothing is random.

        Drawn on the CPU, so that they are the same on any device.
        """
        if not (self.flip or self.pad):
            return None
        mirrored = torch.randint(2, (count, 1), generator=generator) * self.flip
        return torch.cat([mirrored, torch.randint(2 * self.pad + 1, (count, 2), generator=generator)], 1)

    def __call__(self, images: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """(N, C, H, W) as held in memory to (N, C, H, W) as the network wants it.

        Args:
            images: uint8, or float32 as they are.
            draws: rows of `draw`, on the images' device; None for evaluation.
        """
        if draws is not None and self.pad:
            height, width = images.shape[2:]
            padded = F.pad(images, (self.pad,) * 4, value=self.fill)
            # A view of all windows: (N, C, rows cut, columns cut, H, W). Only the chosen ones are copied.
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)
            images = windows[torch.arange(len(images), device=images.device), :, draws[:, 1], draws[:, 2]]
        if draws is not None and self.flip:
            images = torch.where(draws[:, 0].view(-1, 1, 1, 1).bool(), images.flip(3), images)
        if self.mean is None or self.std is None:
            return images
        scale = torch.tensor([1 / (255 * std) for std in self.std], device=images.device).view(-1, 1, 1)
        shift = torch.tensor([-mean / std for mean, std in zip(self.mean, self.std)], device=images.device)
        return images.to(torch.float32).mul_(scale).add_(shift.view(-1, 1, 1))
