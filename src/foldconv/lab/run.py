"""`RunFolder`: what a training run leaves behind, and what each file of it is called."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from ..files.atomic import atomic_path

LOCK = ".lock"
"""Held in a folder while a process works there."""


class RunFolder:
    """The files of a run; whether they are there is another question.

    Args:
        path: of the folder.

    >>> RunFolder("runs/first").checkpoint.as_posix()
    'runs/first/last.ckpt'
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.branches = self.path / "branches.csv"
        self.checkpoint = self.path / "last.ckpt"
        self.best = self.path / "best.ckpt"
        self.folded = self.path / "folded.safetensors"
        self.curves = self.path / "curves.png"
        self.predictions = self.path / "predictions.png"
        self.result = self.path / "result.json"
        self.logger = self.path / "logger.json"
        self.baseline = self.path / "baseline"
        self.lock = self.path / LOCK

    def checkpoints(self, keep: int = 2) -> list[Path]:
        """The newest checkpoint and those before it, as many as are kept.

        >>> [path.name for path in RunFolder("run").checkpoints(3)]
        ['last.ckpt', 'previous.ckpt', 'previous-2.ckpt']
        """
        older = ["previous.ckpt", *(f"previous-{number}.ckpt" for number in range(2, keep))]
        return [self.checkpoint, *(self.path / name for name in older)][:keep]

    def __str__(self) -> str:
        return str(self.path)


def write_rows(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[tuple[int, ...]]:
    """Hold a folder for this process, and remove what killed ones were writing; the lock dies with its process.

    Gives the files that another process has to inherit to keep the folder, should this one be killed.

    Raises:
        UnsupportedError: another process holds it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder)), locked(Path(folder)):
    ...     pass
    Traceback (most recent call last):
    foldconv.errors.UnsupportedError: ...: another process trains here; wait until it has ended, or stop it
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UnsupportedError(f"{folder}: another process trains here; wait until it has ended, or stop it") from None
    try:
        for left in folder.glob(".tmp-*"):
            left.unlink(missing_ok=True)
        descriptor = lock._context.lock_file_fd
        yield (descriptor,) if os.name != "nt" and descriptor is not None else ()  # Windows passes no files on
    finally:
        lock.release()
