"""A loss that is no number any more ends the run: nothing that follows would be worth its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from ...errors import FoldConvError
from .sharding import own_share


class DivergedError(FoldConvError):
    """The loss or the weights are not finite."""


class StopWhenDiverged(pl.Callback):
    """Raises `DivergedError` with the step at which the loss stopped being finite, and the last good checkpoint.

    On a CPU each step is looked at. On an accelerator, and with several processes, looking makes them wait for each
    other: they note the step and look every 50 steps and before each checkpoint, so that no bad one is ever written.

    Args:
        checkpoint: the file that the error names, once it is there.
    """

    def __init__(self, checkpoint: Path, interval: int = 50):
        self._checkpoint = checkpoint
        self._interval = interval
        self._first: torch.Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the first step with a bad loss."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        step = trainer.global_step
        if self._first is None:
            self._first = torch.full((), _NEVER, dtype=torch.int64, device=loss.device)
        here = torch.where(torch.isfinite(loss.detach()), _NEVER, step)
        self._first = torch.minimum(self._first, here)
        alone_on_cpu = loss.device.type == "cpu" and trainer.world_size == 1
        if alone_on_cpu or (batch_idx + 1) % self._interval == 0:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last step's loss may be finite and its weights not."""
        own = [own_share(parameter.detach()) for parameter in pl_module.parameters()]
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in own]).all()
        if self._first is not None:
            self._first = torch.where(finite, self._first, torch.clamp(self._first, max=trainer.global_step))
            self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        if self._first is None:
            return
        first = self._first
        if trainer.world_size > 1:
            first = trainer.strategy.reduce(first, reduce_op="min")  # pyright: ignore[reportArgumentType]
        step = int(first)  # pyright: ignore[reportArgumentType]
        if step >= _NEVER:
            return
        good = f"; the last good checkpoint is {self._checkpoint}" if self._checkpoint.exists() else ""
        raise DivergedError(
            f"the loss or the weights are not finite at step {step} (epoch {trainer.current_epoch + 1}){good}; "
            "try a lower lr, warmup_epochs, or clip_gradient"
        )


_NEVER = 2**62
