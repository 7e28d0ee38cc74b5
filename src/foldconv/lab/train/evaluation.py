"""How good a network is on a data set's test images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...layers.once import composed_once
from ...network.tree import evaluation
from ..data import ImageData, evaluation_loader

TOP = 5
"""So many of the likeliest classes count as an answer of the second accuracy."""


@torch.no_grad()
def evaluate(
    network: nn.Module, data: ImageData, *, device: str | torch.device = "cpu", workers: int = 0
) -> dict[str, Any]:
    """``accuracy`` (share of right answers), ``loss`` (mean cross-entropy) and ``images`` (how many were tested).

    With more than five classes also ``top5_accuracy``: the share of images whose class is among the five likeliest.

    Runs in evaluation mode and gives every module its own mode back.

    Args:
        network: images (batch, channels, height, width) → logits (batch, classes); it is moved to `device`.
        data: whose test images are used.
        device: where to compute.
        workers: processes that decode images, for sets that are read from files.

    Raises:
        UnsupportedError: the network's outputs are not one number per class and image.
    """

    def logits_of(images: Tensor) -> Tensor:
        logits = running(images)
        expected = (len(images), data.num_classes)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            shape = tuple(getattr(logits, "shape", ())) or type(logits).__name__
            raise UnsupportedError(f"expected logits of shape {expected} for {data.name!r}, received {shape}")
        return logits

    network = network.to(device)
    with evaluation(network) as running, composed_once(running):
        loss, right, among, count = score(logits_of, evaluation_loader(data, device=device, workers=workers))
    found = {"accuracy": right / count, "loss": loss / count, "images": count}
    return found | ({"top5_accuracy": among / count} if data.num_classes > TOP else {})


def score(logits_of: Callable[[Tensor], Tensor], batches: Iterable[Any]) -> tuple[float, int, int, int]:
    """The cross-entropy summed over all images, how many were classified right, for how many the right class was among
    the likeliest `TOP`, and how many there are.
    """
    loss, right, among, count = 0.0, 0, 0, 0
    for images, labels in batches:
        logits = logits_of(images)
        loss += float(F.cross_entropy(logits, labels)) * len(labels)
        right += int((logits.argmax(1) == labels).sum())
        likeliest = logits.topk(min(TOP, logits.shape[1])).indices
        among += int((likeliest == labels.view(-1, 1)).sum())
        count += len(labels)
    return loss, right, among, count
