"""How good a network is on a data set's test images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import UnsupportedError
from ...layers.once import composed_once
from ...network.tree import evaluation
from ..data import ImageData, evaluation_loader


@torch.no_grad()
def evaluate(
    network: nn.Module, data: ImageData, *, device: str | torch.device = "cpu", workers: int = 0
) -> dict[str, Any]:
    """``accuracy`` (share of right answers), ``loss`` (mean cross-entropy) and ``images`` (how many were tested).

    Runs in evaluation mode and gives every module its own mode back.

    Args:
        network: images (batch, channels, height, width) → logits (batch, classes); it is moved to `device`.
        data: whose test images are used.
        device: where to compute.
        workers: processes that decode images, for sets that are read from files.

    Raises:
        UnsupportedError: the network's outputs are not one number per class and image.
    """
    right, loss, count = 0, 0.0, 0
    network = network.to(device)
    with evaluation(network) as running, composed_once(running):
        for images, labels in evaluation_loader(data, device=device, workers=workers):
            images, labels = images.to(device), labels.to(device)
            logits = running(images)
            expected = (len(images), data.num_classes)
            if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
                shape = tuple(getattr(logits, "shape", ())) or type(logits).__name__
                raise UnsupportedError(f"expected logits of shape {expected} for {data.name!r}, received {shape}")
            right += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    return {"accuracy": right / count, "loss": loss / count, "images": count}
