"""Segmentation: a class for each pixel."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...network.parameters import regularization
from ...network.tree import evaluation
from ..data import ImageData
from ..data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from ..data.transforms import BatchTransform
from .cityscapes import IGNORED, PALETTE, cityscapes_data, crop_options, resized
from .module import TaskModule
from .pictures import write_grid
from .task import Task, Total, check_unused, own

AUXILIARY = 0.4
"""Weight of the loss of an auxiliary classifier, as in PSPNet's paper."""


class Segmenter(TaskModule):
    """Cross-entropy of the labelled pixels plus the methods' own penalties.

    The network maps images (N, 3, H, W) to logits (N, classes, H, W), or to a dictionary with them as ``out`` and
    perhaps an auxiliary classifier's as ``aux``, as torchvision's do.
    """

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is minimized, the cross-entropy in it, and the share of right pixels times images."""
        outputs = self.outputs(images)
        logits = logits_of(outputs)
        if logits.shape[-2:] != targets.shape[-2:]:
            expected, received = tuple(targets.shape[-2:]), tuple(logits.shape[-2:])
            raise UnsupportedError(
                f"segmentation: expected logits as large as the images, {expected}, received {received}"
            )
        loss = _cross_entropy(logits, targets, self._config.label_smoothing)
        minimized = loss + regularization(self.network)
        if isinstance(outputs, Mapping) and "aux" in outputs:
            minimized = minimized + AUXILIARY * _cross_entropy(outputs["aux"], targets, self._config.label_smoothing)
        labelled = targets != IGNORED
        right = ((logits.detach().argmax(1) == targets) & labelled).sum() / labelled.sum().clamp(min=1)
        return minimized, loss.detach(), right * len(targets)


def logits_of(outputs: Any) -> Tensor:
    """The main logits among a network's outputs.

    Raises:
        UnsupportedError: there are none.
    """
    logits = outputs["out"] if isinstance(outputs, Mapping) and "out" in outputs else outputs
    if not isinstance(logits, Tensor) or logits.ndim != 4:
        received = tuple(logits.shape) if isinstance(logits, Tensor) else type(outputs).__name__
        raise UnsupportedError(f"segmentation: expected logits (images, classes, height, width), received {received}")
    return logits


def _cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The mean over labelled pixels; 0 where there is none, which torch would call NaN."""
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


class Segmentation(Task):
    """Cityscapes' 19 classes, measured by the mean intersection over union."""

    name, measure, label = "segmentation", "miou", "mIoU"
    columns = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "test_miou", "lr")

    def check(self, config: Any) -> None:
        """Refuse options of classification, and augmentations that there are not."""
        check_unused(self.name, config, mixup=0.0, cutmix=0.0, qat=False, holdout=False, normalize=True)
        crop_options(config.augmentation_args, config.augmentation)

    def open_data(self, config: Any) -> ImageData:
        """The folder that a `TrainConfig` names; raises what `cityscapes_data` does."""
        return cityscapes_data(
            config.data, config.image_size, crop_options(config.augmentation_args, config.augmentation)
        )

    def module(self, network: nn.Module, config: Any, data: ImageData) -> Segmenter:
        """The network with its cross-entropy."""
        return Segmenter(network, config)

    def check_network(self, network: nn.Module, data: ImageData, name: str) -> None:
        """Refuse a network that does not take test images as large as the first, which are not cut as training's are.

        Raises:
            UnsupportedError: with their size and the reason.
        """
        if not len(data.test):  # pyright: ignore[reportArgumentType]
            return
        image: Tensor = data.test[0][0]
        with contextlib.suppress(Exception):  # of shapes alone, which takes no time; not every code runs so
            shadow = copy.deepcopy(network).to("meta").eval()
            if logits_of(shadow(torch.empty(1, *image.shape, device="meta"))).shape[-2:] == image.shape[-2:]:
                return
        height, width = image.shape[-2:]
        try:
            with torch.no_grad(), evaluation(network) as running:
                found = tuple(logits_of(running(data.transform(image[None]))).shape[-2:])
            reason = "" if found == (height, width) else f"its logits are {found[0]}×{found[1]}"
        except Exception as error:  # of any code
            reason = " ".join(str(error).split())
        if reason:
            raise UnsupportedError(
                f"{name}: does not take test images of {height}×{width}, which are not cut as training's are: "
                f"{reason}; give another --image-size (of the shorter side), other images or another network"
            )

    def score(
        self, outputs_of: Callable[[Any], Any], batches: Iterable[Any], data: ImageData, total: Total = own
    ) -> dict[str, float]:
        """``loss`` and ``accuracy`` of labelled pixels, and ``miou`` over the classes that occur (torchmetrics)."""
        from torchmetrics.classification import MulticlassJaccardIndex

        measure, loss, right, pixels = None, 0.0, 0, 0
        for images, masks in batches:
            logits = logits_of(outputs_of(images))
            if logits.shape[1] != data.num_classes or logits.shape[-2:] != masks.shape[-2:]:
                expected = (len(images), data.num_classes, *masks.shape[-2:])
                raise UnsupportedError(f"expected logits of shape {expected}, received {tuple(logits.shape)}")
            if measure is None:
                measure = MulticlassJaccardIndex(data.num_classes, ignore_index=IGNORED).to(logits.device)
            found = logits.argmax(1)
            measure.update(found, masks)
            loss += float(F.cross_entropy(logits.float(), masks, ignore_index=IGNORED, reduction="sum"))
            right += int(((found == masks) & (masks != IGNORED)).sum())
            pixels += int((masks != IGNORED).sum())
        loss, right, pixels = total(loss, right, pixels)
        if measure is None or not pixels:
            raise UnsupportedError(f"{data.name}: expected labelled pixels in the test images, found none")
        return {"loss": loss / pixels, "accuracy": right / pixels, "miou": float(measure.compute())}

    def read(self, image: Any, description: Mapping[str, Any]) -> Tensor:
        """An image of PIL as the network sees it in evaluation, (1, 3, H, W)."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if (size := description.get("image_size")) is not None:
            pixels, _ = resized(pixels, None, size / min(pixels.shape[1:]))
        return BatchTransform(IMAGENET_MEAN, IMAGENET_STD)(pixels[None])

    def answers(self, output: Any, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Each class that was found and its share of the pixels, the largest first."""
        found = logits_of(output).argmax(1)
        counts = found.flatten().bincount(minlength=len(classes))
        order = [i for i in counts.argsort(descending=True, stable=True).tolist() if counts[i]]
        return [{"class": classes[i], "index": i, "share": float(counts[i] / found.numel())} for i in order]

    def painted(self, image: Tensor, output: Any, classes: Sequence[str]) -> Tensor:
        """The image with its classes' colours over it; `output` may be a mask, too."""
        mask = output if isinstance(output, Tensor) and output.ndim == 2 else logits_of(output)[0].argmax(0)
        colours = torch.tensor([*PALETTE, *[(0, 0, 0)] * (256 - len(PALETTE))], dtype=torch.uint8)
        layer = colours[mask.cpu().long()].permute(2, 0, 1)
        if layer.shape[1:] != image.shape[1:]:
            layer = F.interpolate(layer[None].float(), image.shape[1:]).to(torch.uint8)[0]
        return (image.float() * 0.4 + layer.float() * 0.6).to(torch.uint8)

    @torch.no_grad()
    def draw(self, network: nn.Module, data: ImageData, path: str | os.PathLike[str]) -> None:
        """Up to four test images: as they are, their masks, what the network says."""
        device, rows = next(network.parameters()).device, []
        for index in range(min(4, len(data.test))):  # pyright: ignore[reportArgumentType]
            image, mask = data.test[index]
            output = network(data.transform(image[None]).to(device))
            classes = data.classes or ()
            rows.append([image, self.painted(image, mask, classes), self.painted(image, output, classes)])
        write_grid(rows, ("image", "truth", "network"), path)
