"""`Classifier`: a network that maps images to logits, the loss of a `TrainConfig`, and an average of the weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...network.parameters import regularization
from .config import TrainConfig


class Classifier(nn.Module):
    """Cross-entropy plus the methods' own penalties, and an average of the weights.

    With ``config.ema`` the network is evaluated, and later folded, with the average of its weights over the steps
    (timm's ModelEmaV3, norm statistics included), and checkpoints hold both.

    Args:
        network: images (batch, channels, height, width) → logits (batch, classes); plain or expanded.
        config: loss, averaging, compilation, memory layout.
        num_classes: number of classes.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, num_classes: int):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last) if config.channels_last else network  # pyright: ignore[reportCallIssue]
        self._config = config
        self._mix = _mixing(config, num_classes)
        self.average: Any = None
        if config.ema:
            from timm.utils.model_ema import ModelEmaV3

            self.average = ModelEmaV3(network, decay=config.ema).requires_grad_(False)
        called = torch.compile(network) if config.compile else network
        self.call_instead(called)

    @property
    def trained(self) -> nn.Module:
        """The network that counts: the averaged one where there is an average."""
        return self.network if self.average is None else self.average.module

    def call_instead(self, called: Any) -> None:
        """What is called in the network's place; no submodule, since each tensor has one name in a checkpoint."""
        object.__setattr__(self, "_called", called)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is minimized, the cross-entropy in it, and how many images were classified right."""
        targets = labels
        if self._mix is not None:
            images, targets = self._mix(images, labels)
        logits = self.logits(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self._config.label_smoothing)
        right = (logits.detach().argmax(1) == labels).sum()
        return loss + regularization(self.network), loss.detach(), right

    def logits(self, images: Tensor, network: nn.Module | None = None) -> Tensor:
        """Logits of images, of the network that is trained or of another one."""
        images = images.contiguous(memory_format=torch.channels_last) if self._config.channels_last else images
        called: Any = self._called if network is None or network is self.network else network
        return called(images)


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
