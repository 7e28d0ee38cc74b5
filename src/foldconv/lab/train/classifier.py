"""`Classifier`: a network that maps images to logits, the loss of a `TrainConfig`, and an average of the weights."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...network.parameters import regularization
from ..tasks.module import TaskModule
from .config import TrainConfig


class Classifier(TaskModule):
    """Cross-entropy plus the methods' own penalties.

    Args:
        network: images (batch, channels, height, width) → logits (batch, classes); plain or expanded.
        config: loss, averaging, compilation, memory layout.
        num_classes: number of classes.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, num_classes: int):
        super().__init__(network, config)
        self._mix = _mixing(config, num_classes)

    def forward(self, images: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What is minimized, the cross-entropy in it, and how many images were classified right."""
        wanted = targets
        if self._mix is not None:
            images, wanted = self._mix(images, targets)
        logits = self.outputs(images)
        loss = F.cross_entropy(logits, wanted, label_smoothing=self._config.label_smoothing)
        right = (logits.detach().argmax(1) == targets).sum()
        return loss + regularization(self.network), loss.detach(), right


def _mixing(config: TrainConfig, num_classes: int) -> Any:
    """Mixup, CutMix, either by chance, or None; both draw from torch's generator, which each epoch seeds."""
    if not (config.mixup or config.cutmix):
        return None
    from torchvision.transforms import v2

    chosen: list[Any] = []
    if config.mixup:
        chosen.append(v2.MixUp(alpha=config.mixup, num_classes=num_classes))
    if config.cutmix:
        chosen.append(v2.CutMix(alpha=config.cutmix, num_classes=num_classes))
    return chosen[0] if len(chosen) == 1 else v2.RandomChoice(chosen)
