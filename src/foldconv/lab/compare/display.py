"""How far a comparison is: one display for all its runs; plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..run import RunFolder
from .config import CompareConfig, Job
from .results import Curve, curve, read_json

_REFRESH = 0.5
"""Seconds between two looks at the runs' files."""


class Display:
    """Runs done, what the running ones have reached, and an estimate of the time left."""

    def __init__(self, console: Console):
        self._console = console
        self._total = self._finished = self._epochs = 0
        self._begin = self._looked = 0.0
        self._work = 0.0
        self._offset: dict[Job, float] = {}
        self._live: Live | None = None

    @contextlib.contextmanager
    def shown(self, config: CompareConfig, total: int, finished: int, at_once: int) -> Iterator[None]:
        """Show it during the block.

        Args:
            config: what is compared.
            total: number of runs.
            finished: how many were done before.
            at_once: how many run at once.
        """
        self._total, self._finished, self._epochs = total, finished, config.train.epochs
        self._begin = time.perf_counter()
        if finished and finished < total:
            self._console.print(f"{finished} of {total} runs are done already", highlight=False)
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            yield
        self._live = None

    def ended(self, job: Job, seconds: float, finished: int, error: str | None) -> None:
        """A line that stays, for a run that has ended."""
        self._finished = finished
        self._work += 1 - self._offset.pop(job, 0.0)
        what = f"{job.method}, seed {job.seed}: "
        if error is None:
            accuracy = 100 * read_json(RunFolder(job.folder).result).get("accuracy_folded", float("nan"))
            what += f"{accuracy:.2f} %"
        else:
            what += f"failed ({error})"
        self._console.print(
            f"{what}, {duration(seconds)} ({finished}/{self._total}{self._left([])})",
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
        curves = [(job, curve(job)) for job in running]
        for job, found in curves:
            self._offset.setdefault(job, self._share(found))  # what a run had done before it was continued
        if self._live is None:
            return
        table = Table.grid(padding=(0, 2))
        for job, found in curves:
            epoch, accuracy = found[-1] if found else (0, None)
            reached = "" if accuracy is None else f"test accuracy {accuracy:.2f} %"
            table.add_row(f"  {job.method}", f"seed {job.seed}", f"epoch {epoch}/{self._epochs}", reached)
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(f"{self._finished}/{self._total} runs"),
            ProgressBar(self._total, self._finished, width=24),
            Text(self._left(curves).removeprefix(", ")),
        )
        self._live.update(Group(head, table), refresh=True)

    def _share(self, found: Curve) -> float:
        return found[-1][0] / self._epochs if found else 0.0

    def _left(self, curves: Sequence[tuple[Job, Curve]]) -> str:
        begun = sum(self._share(found) for _, found in curves)
        work = self._work + sum(self._share(found) - self._offset.get(job, 0.0) for job, found in curves)
        todo = self._total - self._finished - begun
        if todo <= 0 or work <= 0:
            return ""
        return f", about {duration((time.perf_counter() - self._begin) / work * todo)} left"


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
