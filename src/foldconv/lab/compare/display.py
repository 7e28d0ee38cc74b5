"""How far a comparison is: one display for all its runs; plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..run import RunFolder
from .config import CompareConfig, Job
from .results import curve, read_json

_REFRESH = 0.5
"""Seconds between two looks at the runs' files."""


class Display:
    """Runs done, what the running ones have reached, and an estimate of the time left."""

    def __init__(self, console: Console):
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[reached]}"),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=float("inf"),
        )
        self._all = self._progress.add_task("runs", reached="")
        self._running: dict[Job, TaskID] = {}
        self._epochs = self._finished = 0
        self._looked = 0.0

    @contextlib.contextmanager
    def shown(self, config: CompareConfig, total: int, finished: int) -> Iterator[None]:
        """Show it during the block.

        Args:
            config: what is compared.
            total: number of runs.
            finished: how many were done before.
        """
        self._finished, self._epochs = finished, config.train.epochs
        self._progress.update(self._all, total=total, completed=finished)
        if finished and finished < total:
            self._console.print(f"{finished} of {total} runs are done already", highlight=False)
        with self._progress:
            yield

    def ended(self, job: Job, seconds: float, finished: int, error: str | None) -> None:
        """A line that stays, for a run that has ended."""
        self._finished = finished
        self._progress.update(self._all, completed=finished)
        if (shown := self._running.pop(job, None)) is not None:
            self._progress.remove_task(shown)
        what = f"failed ({error})"
        if error is None:
            accuracy = 100 * read_json(RunFolder(job.folder).result).get("accuracy_folded", float("nan"))
            what = f"{accuracy:.2f} %"
        runs = self._progress.tasks[0]
        left = f", about {duration(runs.time_remaining)} left" if runs.time_remaining else ""
        self._console.print(
            f"{job.method}, seed {job.seed}: {what}, {duration(seconds)} ({finished}/{runs.total:.0f}{left})",
            style=None if error is None else "red",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )

    def update(self, running: Sequence[Job]) -> None:
        """Look at what the running ones have written, not more often than anybody can read."""
        if time.perf_counter() - self._looked < _REFRESH:
            return
        self._looked = time.perf_counter()
        epochs = 0
        for job in running:
            if job not in self._running:
                name = f"  {job.method}, seed {job.seed}"
                self._running[job] = self._progress.add_task(name, total=self._epochs, reached="")
            if found := curve(job):
                epoch, accuracy = found[-1]
                reached = f"test accuracy {accuracy:.2f} %"
                self._progress.update(self._running[job], completed=epoch, reached=reached)
                epochs += epoch
        self._progress.update(self._all, completed=self._finished + epochs / self._epochs)
        self._progress.refresh()


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(4.21), duration(75), duration(7300)
    ('4.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
