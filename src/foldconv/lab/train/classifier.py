"""`Classifier`: any network that maps images to logits, with the loss and the optimizer of a `TrainConfig`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics.classification import MulticlassAccuracy

from ...layers.once import composed_once
from ...network.parameters import regularization
from .config import TrainConfig
from .optimizers import create_optimizer, create_schedule, training_groups
from .sharding import ShardedStrategy


class Classifier(pl.LightningModule):
    """Cross-entropy plus the methods' own penalties, the optimizer and schedule of a config, an average of the weights.

    With ``config.ema`` the network is evaluated, and later folded, with the average of its weights over the steps
    (timm's ModelEmaV3, norm statistics included), and checkpoints hold both.

    Args:
        network: images (batch, channels, height, width) → logits (batch, classes); plain or expanded.
        config: optimizer, schedule, loss, averaging, compilation.
        num_classes: number of classes.
        description: how to build the network again, kept in each checkpoint under ``"foldconv"``.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, num_classes: int, description: dict[str, Any]):
        super().__init__()
        self.network = network
        self._config = config
        self._description = description
        self._mix = _mixing(config, num_classes)
        self._averaged_step = 0
        self.validating = contextlib.ExitStack()
        """What is open during validation; to be closed also where training ends within it."""
        self.average: Any = None
        if config.ema:
            from timm.utils.model_ema import ModelEmaV3

            self.average = ModelEmaV3(network, decay=config.ema).requires_grad_(False)
        called = torch.compile(network) if config.compile else network
        object.__setattr__(self, "_called", called)  # not as a submodule: each tensor has one name in a checkpoint
        # micro: the share of right answers among all images, whatever their class
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    @property
    def trained(self) -> nn.Module:
        """The network that counts: the averaged one where there is an average."""
        return self.network if self.average is None else self.average.module

    def configure_model(self) -> None:
        """Split the network among the processes where the strategy does that."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            strategy.shard(self.network)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        return self._called(self._placed(images))  # pyright: ignore[reportCallIssue]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        targets = labels
        if self._mix is not None:
            images, targets = self._mix(images, labels)
        logits = self(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self._config.label_smoothing)
        self.train_accuracy(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss + regularization(self.network)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Average once per step of the optimizer, not per batch whose gradients are only summed up."""
        step = self.trainer.global_step
        if self.average is not None and step > self._averaged_step:
            self.average.update(self.network)
        self._averaged_step = step

    def on_validation_start(self) -> None:
        """All processes evaluate with the first one's norm statistics, which checkpoints hold; each composes once.

        DDP would bring statistics into line at each forward, too, which writes to tensors that have been composed.
        """
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, 0)
        if isinstance(strategy.model, DistributedDataParallel):
            self.validating.enter_context(_without_broadcasts(strategy.model))
        # A split network has no whole parameters to compose from before its forward gathers them, and a compiled one
        # composes in its compiled code.
        if not isinstance(strategy, ShardedStrategy):
            self.validating.enter_context(composed_once(self.trained))

    def on_validation_end(self) -> None:
        """Training goes on, with kernels that are composed at each forward."""
        self.validating.close()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Loss and accuracy on the test images, shown and recorded; nothing is chosen by them."""
        images, labels = batch
        logits = self(images) if self.average is None else self.average(self._placed(images))
        self.test_accuracy(logits, labels)
        self.log("test_loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> Any:
        """The optimizer over the groups with their right decay, and the schedule over all steps of the run."""
        config = self._config
        groups = training_groups(
            self.network, config.weight_decay, config.lr, config.stem_lr_factor, config.bias_lr_factor
        )
        optimizer = create_optimizer(groups, config)
        schedule = create_schedule(optimizer, config, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description: a checkpoint alone is enough to build its network."""
        checkpoint["foldconv"] = self._description

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on averaging with the step after the checkpoint's."""
        self._averaged_step = checkpoint["global_step"]

    def _placed(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self._config.channels_last else images


@contextlib.contextmanager
def _without_broadcasts(network: DistributedDataParallel) -> Iterator[None]:
    before, network.broadcast_buffers = network.broadcast_buffers, False
    try:
        yield
    finally:
        network.broadcast_buffers = before


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
