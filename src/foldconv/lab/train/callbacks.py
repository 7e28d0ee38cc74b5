"""What happens around the training loop, one concern per class."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..data import epoch_seed
from ..run import write_rows

COLUMNS: tuple[str, ...] = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")


class LastCheckpoint(pl.Callback):
    """Writes the checkpoint at the start and after each epoch, always at an epoch's border.

    A run resumed from there repeats the epoch that was cut off, from the same state in the same order of images, so
    it ends with the weights of an undisturbed run. The order in the list of callbacks matters: last, so that what
    the others keep is in it.
    """

    def __init__(self, path: Path):
        self._path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ctrl-C in the first epoch leaves something to resume from, too."""
        if trainer.global_step == 0:
            trainer.save_checkpoint(self._path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the checkpoint of the epoch before."""
        trainer.save_checkpoint(self._path)


class EpochSeed(pl.Callback):
    """Seeds what draws at random inside the network (dropout, stochastic depth) by seed and epoch alone."""

    def __init__(self, seed: int):
        self._seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        """Before the first batch; Lightning skips its epoch-start hook in the first epoch after a resume."""
        if batch_idx == 0:
            # each process draws differently, as its images differ
            torch.manual_seed(epoch_seed(self._seed, trainer.current_epoch) + (trainer.global_rank << 32))


class Stopwatch(pl.Callback):
    """The time spent in training epochs, without validation, over all parts of a run that was cut off."""

    def __init__(self):
        self.seconds = 0.0
        self._begin: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The seconds until the checkpoint was written."""
        self.seconds = float(state_dict["seconds"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning skips its epoch-start hook in the first epoch after a resume."""
        self._start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the first batch is loaded."""
        self._start()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation comes at the end of each epoch."""
        if self._begin is not None:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)  # steps are queued, not done, when they return
            self.seconds += time.perf_counter() - self._begin
            self._begin = None

    def _start(self) -> None:
        if self._begin is None:
            self._begin = time.perf_counter()


class Rows(pl.Callback):
    """Rows in a CSV file, whole at any moment; a resumed run goes on with the rows of its checkpoint.

    So this stands before the callback that writes checkpoints. Where several processes train, the first one writes.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Sequence[str]):
        self.rows: list[dict[str, Any]] = []
        self._path, self._columns = path, columns

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The rows until the checkpoint was written."""
        self.rows = list(state_dict["rows"])

    def add(self, rows: list[dict[str, Any]], trainer: pl.Trainer) -> None:
        """Add an epoch's rows."""
        self.rows = [*self.rows, *rows]
        if trainer.is_global_zero:
            short = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in self.rows]
            write_rows(self._path, self._columns, short)


class MetricsTable(Rows):
    """One row per epoch: loss and accuracy on both sets of images, and the learning rate."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path, COLUMNS)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add this epoch's row."""
        row: dict[str, Any] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row |= {"epoch": trainer.current_epoch + 1, "lr": float(trainer.optimizers[0].param_groups[0]["lr"])}
        self.add([{name: row[name] for name in COLUMNS}], trainer)


class EpochProgress(pl.Callback):
    """A progress bar per epoch, which stays as a line with its results; without a terminal only the line is written."""

    def __init__(self, console: Console):
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        """Open the bar with the first batch."""
        if batch_idx == 0:
            width = len(str(trainer.max_epochs))
            self._progress = progress = Progress(
                TextColumn(f"epoch {trainer.current_epoch + 1:{width}}/{trainer.max_epochs}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[results]}"),
                console=self._console,
            )
            self._task = progress.add_task("", total=trainer.num_training_batches, results="")
            progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """One step further."""
        if self._progress:
            self._progress.advance(self._task)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the results and leave the line standing."""
        values = trainer.callback_metrics
        if self._progress:
            self._progress.update(
                self._task,
                results=f"loss {values['train_loss']:.3f}  test accuracy {100 * values['test_accuracy']:.2f} %",
            )
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back before anybody writes an error."""
        self._close()

    def _close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
