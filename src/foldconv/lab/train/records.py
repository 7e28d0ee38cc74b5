"""What a run shows and writes while it trains: a line and a row per epoch, branches, logs, checkpoints."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...network.branches import branches
from ..run import RunFolder, write_rows
from .branch_table import COLUMNS as BRANCH_COLUMNS
from .loggers import open_logger
from .loop import Training, refused
from .resuming import second_name, write_checkpoint


class Records:
    """The files of a run that grow with each epoch; a resumed run goes on with the rows of its checkpoint.

    Where several processes train, the first one writes.

    Args:
        training: what to write about.
        description: how to build the network again, kept in each checkpoint under ``"foldconv"``.
        folder: of the run.
        console: shows the progress.
        start: the checkpoint that the run goes on from, and its content.

    Raises:
        CheckpointError: `start` has no such rows.
        UnsupportedError: ``track_branches`` for a network without foldable layers.
    """

    def __init__(
        self,
        training: Training,
        description: dict[str, Any],
        folder: RunFolder,
        console: Console,
        start: tuple[Path, dict[str, Any]] | None = None,
    ):
        self._training, self._description, self._folder, self._console = training, description, folder, console
        self._config, self._writes = training.config, training.fabric.is_global_zero
        self._columns = training.task.columns
        self.rows: list[dict[str, Any]] = []
        self._branches: list[dict[str, Any]] = []
        if start:
            with refused(start[0]):
                kept = start[1]["callbacks"]  # where files of Lightning's Trainer have them
                optional = training.task.optional
                self.rows = [
                    {name: row[name] for name in self._columns if name in row or name not in optional}
                    for row in kept["MetricsTable"]["rows"]
                ]
                if self._config.track_branches:
                    rows = kept["BranchHistory"]["rows"]
                    self._branches = [{name: row[name] for name in BRANCH_COLUMNS} for row in rows]
        steps = training.steps_per_epoch
        self._logger = open_logger(self._config, folder, self.rows, steps) if self._writes else None
        if start and self._writes:
            self._keep_best(start[0])
        if not start:  # Ctrl-C in the first epoch leaves something to resume from, too
            self._add_branches()
            self._write_checkpoint()

    def epoch(self) -> None:
        """Train one epoch, and write what came of it; the checkpoint last, so that all of it is in there."""
        training = self._training
        epoch, epochs = training.epoch + 1, self._config.epochs
        with _progress(self._console, f"epoch {epoch:{len(str(epochs))}}/{epochs}", len(training.batches)) as bar:
            row: dict[str, Any] = {"epoch": epoch} | training.train(bar.advance)
            row |= training.validate() | {"lr": training.lr}
            task = training.task
            bar.results = f"loss {row['train_loss']:.3f}  test {task.label} {100 * row[f'test_{task.measure}']:.2f} %"
        optional = training.task.optional
        row = {name: row[name] for name in self._columns if name in row or name not in optional}
        self.rows.append(row)
        if self._writes:
            _write(self._folder.metrics, self._columns, self.rows)
        if self._logger is not None:
            self._logger.log_metrics(row, step=training.step)
            self._logger.save()
        self._add_branches()
        self._write_checkpoint()

    @property
    def stopped(self) -> bool:
        """Whether the run is over: all epochs are done, or the task's measure has not risen for `patience` of them."""
        waited = len(self.rows) - self.best_epoch
        return self._training.epoch >= self._config.epochs or 0 < self._config.patience <= waited

    def close(self) -> None:
        """Leave the logs complete."""
        if self._logger is not None:
            self._logger.finalize("success")

    def _add_branches(self) -> None:
        """One row per layer and branch; those of epoch 0 are of the network before training."""
        if not (self._config.track_branches and self._writes):
            return
        for layer in branches(self._training.module.trained).layers:
            shared = {"identity_distance": layer.identity_distance, "groups": layer.groups}
            for branch in layer.branches:
                own = {"branch": branch.name, "share": branch.share, "norm": branch.norm}
                own |= {"similarity": branch.similarity}
                self._branches.append({"epoch": self._training.epoch, "layer": layer.name, **own, **shared})
        _write(self._folder.branches, BRANCH_COLUMNS, self._branches)

    def _write_checkpoint(self) -> None:
        """Always at an epoch's border."""
        content = {"foldconv": self._description, **self._training.state()}
        content["callbacks"] = {"MetricsTable": {"rows": self.rows}, "BranchHistory": {"rows": self._branches}}
        if self._writes:
            write_checkpoint(content, self._folder, self._config.keep)
            self._keep_best(self._folder.checkpoint)

    def _keep_best(self, newest: Path) -> None:
        """The checkpoint just written, or gone on from, also is the best one where its epoch is."""
        if self._config.best and self.rows and self.best_epoch == self.rows[-1]["epoch"]:
            second_name(newest, self._folder.best)

    @property
    def best_epoch(self) -> int:
        """The number of the first epoch with the highest measure on the test images; 0 where none is trained."""
        return best_epoch(self.rows, self._training.task.measure)


def best_epoch(rows: list[dict[str, Any]], measure: str) -> int:
    """The number of the first epoch with the highest measure on the test images; 0 where none is trained.

    >>> best_epoch([{"epoch": 1, "test_miou": 0.5}, {"epoch": 2, "test_miou": 0.5}], "miou")
    1
    """
    return max(rows, key=lambda row: row[f"test_{measure}"])["epoch"] if rows else 0


def _write(path: str | os.PathLike[str], columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    short = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    write_rows(path, columns, short)


class _Bar:
    def __init__(self, progress: Progress, total: int):
        self._progress, self._task = progress, progress.add_task("", total=total, results="")
        self._done, self._total, self._next = 0, total, 0.0
        self.results = ""

    def advance(self) -> None:
        """One batch further; what is shown follows at most ten times a second."""
        self._done += 1
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.1
            self._progress.update(self._task, completed=self._done)

    def finish(self) -> None:
        """Show the results."""
        self._progress.update(self._task, completed=self._done, results=self.results)


@contextlib.contextmanager
def _progress(console: Console, name: str, total: int) -> Iterator[_Bar]:
    """A progress bar, which stays as a line with its results; without a terminal only the line is written.

    An error, too, finds the terminal given back.
    """
    columns = (
        TextColumn(name),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[results]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        bar = _Bar(progress, total)
        try:
            yield bar
        finally:
            bar.finish()
