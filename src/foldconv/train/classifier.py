"""`Classifier`: any network that maps images to logits, with the loss and the optimizer of a `TrainConfig`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from ..optimization import parameter_groups, regularization
from .config import TrainConfig


class Classifier(pl.LightningModule):
    """Cross-entropy plus the methods' own penalties; SGD with momentum; a learning rate for each step.

    Args:
        network: images (batch, channels, height, width) → logits (batch, classes); plain or expanded.
        config: learning rate, momentum, weight decay, schedule.
        num_classes: number of classes.
        description: how to build the network again, kept in each checkpoint under ``"foldconv"``.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, num_classes: int, description: dict[str, Any]):
        super().__init__()
        self.network = network
        self._config = config
        self._description = description
        # micro: the share of right answers among all images, whatever their class
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss + regularization(self.network)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Loss and accuracy on the test images, shown and recorded; nothing is chosen by them."""
        images, labels = batch
        logits = self(images)
        self.test_accuracy(logits, labels)
        self.log("test_loss", F.cross_entropy(logits, labels))
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> Any:
        """SGD over the groups with their right decay, and the schedule over all steps of the run."""
        config = self._config
        groups = parameter_groups(self.network, config.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
        steps = int(self.trainer.estimated_stepping_batches)
        if config.schedule == "onecycle":
            # a cycled momentum would need a momentum to cycle
            schedule: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, steps, cycle_momentum=False)
        else:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description: a checkpoint alone is enough to build its network."""
        checkpoint["foldconv"] = self._description
