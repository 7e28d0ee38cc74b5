"""`BranchHistory`: what `foldconv.branches` finds, written down after each epoch."""

from __future__ import annotations

import os

import lightning.pytorch as pl
from torch import nn

from ...network.branches import branches
from .branch_table import COLUMNS
from .callbacks import Rows


class BranchHistory(Rows):
    """One row per epoch, layer and branch; epoch 0 is the network before training.

    Args:
        path: the file; its columns are those of `branch_table.COLUMNS`.

    Raises:
        UnsupportedError: when training starts, for a network without foldable layers.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path, COLUMNS)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The network as it starts; a run resumed from there has these rows already."""
        if trainer.global_step == 0 and not self.rows:
            self._add(0, trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add this epoch's rows."""
        self._add(trainer.current_epoch + 1, trainer, pl_module)

    def _add(self, epoch: int, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        # What counts in the end: an average of the weights where there is one.
        network: nn.Module = getattr(pl_module, "trained", getattr(pl_module, "network", pl_module))
        # A compiled module is a wrapper; the layers' names are those of what it wraps.
        report = branches(getattr(network, "_orig_mod", network))
        found = [
            {
                "epoch": epoch,
                "layer": layer.name,
                "branch": branch.name,
                "share": branch.share,
                "norm": branch.norm,
                "similarity": branch.similarity,
                "identity_distance": layer.identity_distance,
                "groups": layer.groups,
            }
            for layer in report.layers
            for branch in layer.branches
        ]
        self.add(found, trainer)
