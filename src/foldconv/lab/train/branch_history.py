"""`BranchHistory`: what `foldconv.branches` finds, written down after each epoch."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from ...files.atomic import atomic_path
from ...network.branches import branches
from .branch_table import COLUMNS, Row


class BranchHistory(pl.Callback):
    """One row per epoch, layer and branch in a CSV file, whole at any moment.

    The columns are those of `branch_table.COLUMNS`; epoch 0 is the network before training. A resumed run goes on with
    the rows of its checkpoint, so this stands before the callback that writes checkpoints. Where several processes
    train, the first one writes.

    Args:
        path: the file.

    Raises:
        UnsupportedError: when training starts, for a network without foldable layers.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.rows: list[Row] = []
        self._path = Path(path)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The rows until the checkpoint was written."""
        self.rows = list(state_dict["rows"])

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
        self.rows = [*self.rows, *found]
        with atomic_path(self._path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({name: _text(value) for name, value in row.items()} for row in self.rows)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
