"""What an epoch's steps add up to; a loss that is no number any more ends the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FoldConvError
from .processes import summed
from .sharding import own_share

_NEVER = 2**62


class DivergedError(FoldConvError):
    """The loss or the weights are not finite: nothing that follows would be worth its time."""


class Losses:
    """Mean loss and accuracy of an epoch's images, over all processes; no bad loss goes unseen.

    On a CPU each step is looked at. On an accelerator, and with several processes, looking makes them wait for each
    other: they keep what a step gave and look every 50 steps and before each checkpoint, so that no bad one is ever
    written.

    Args:
        fabric: Lightning's, for the device and the other processes.
        epoch: which one this is, from 1.
        checkpoint: the file that an error names, once it is there.
        interval: steps between two looks.
    """

    def __init__(self, fabric: Any, epoch: int, checkpoint: Path, interval: int = 50):
        self._fabric, self._epoch, self._checkpoint = fabric, epoch, checkpoint
        self._interval = 1 if fabric.device.type == "cpu" and fabric.world_size == 1 else interval
        self._kept: list[tuple[int, Tensor, Tensor, Tensor, int]] = []
        self._loss, self._right, self._images = 0.0, 0.0, 0

    def add(self, step: int, minimized: Tensor, loss: Tensor, right: Tensor, images: int) -> None:
        """What a batch gave, and how many steps the optimizer has done with it."""
        self._kept.append((step, minimized.detach(), loss, right, images))
        if len(self._kept) >= self._interval:
            self._look()

    def means(self, step: int, weights: Iterable[Tensor]) -> dict[str, float]:
        """``train_loss`` and ``train_accuracy``; the last step's loss may be finite and its weights not.

        Raises:
            DivergedError: a loss was not finite, or a weight is not.
        """
        finite = torch.stack([torch.isfinite(own_share(weight.detach())).all() for weight in weights]).all()
        self._look(_NEVER if finite else step)
        loss, right, images = summed(self._fabric, self._loss, self._right, self._images)
        return {"train_loss": loss / images, "train_accuracy": right / images}

    def _look(self, first: int = _NEVER) -> None:
        """`first` is the first step that is known to be bad."""
        if self._kept:
            steps, minimized, losses, right, images = zip(*self._kept)
            self._kept = []
            self._loss += sum(loss * count for loss, count in zip(_numbers(losses), images))
            self._right += sum(_numbers(right))
            self._images += sum(images)
            bad = [step for step, value in zip(steps, _numbers(minimized)) if not math.isfinite(value)]
            first = min([first, *bad])
        if self._fabric.world_size > 1:
            mine = torch.tensor(first, device=self._fabric.device)
            first = int(self._fabric.all_reduce(mine, reduce_op="min"))
        if first < _NEVER:
            good = f"; the last good checkpoint is {self._checkpoint}" if self._checkpoint.exists() else ""
            raise DivergedError(
                f"the loss or the weights are not finite at step {first} (epoch {self._epoch}){good}; "
                "try a lower lr, warmup_epochs, or clip_gradient"
            )


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    """All with one wait for the device; a stack of one would only cost time."""
    return [tensors[0].item()] if len(tensors) == 1 else torch.stack(tuple(tensors)).tolist()
