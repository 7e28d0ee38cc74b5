"""What the runs of a comparison wrote, read back; files that are missing or damaged are runs that are not done."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ..run import RunFolder
from .config import CompareConfig, Job

Curve = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run."""

    job: Job
    result: dict[str, Any]
    """Its result.json."""
    starts: int
    """How often it was started; more than once when it was cut off and continued."""
    parallel: int
    """How many jobs ran at once, at most."""
    wall_seconds: float | None

    @property
    def accuracy(self) -> float:
        """Of the folded network after the last epoch, in percent of the test images."""
        return 100 * float(self.result["accuracy_folded"])

    @property
    def training_seconds(self) -> float | None:
        """Of the training epochs; else of the whole run. None for a run that was cut off: its time is of no use."""
        if self.starts > 1:
            return None
        return number(self.result.get("training_seconds")) or number(self.result.get("seconds"))

    @property
    def peak_memory(self) -> float | None:
        """In bytes."""
        return number(self.result.get("peak_memory"))


def outcomes(config: CompareConfig, root: Path) -> list[Outcome]:
    """All finished runs, in the order of the jobs."""
    found = []
    for job in config.jobs(root):
        result = read_json(RunFolder(job.folder).result)
        if not _complete(result):
            continue
        record = read_json(job.beside(".json"))
        wall = number(record.get("wall_seconds"))
        found.append(Outcome(job, result, int(record.get("starts", 1)), int(record.get("parallel", 1)), wall))
    return found


def finished(job: Job) -> bool:
    """Whether the run has ended well; its result is the last thing that it writes."""
    return _complete(read_json(RunFolder(job.folder).result))


def _complete(result: dict[str, Any]) -> bool:
    return number(result.get("accuracy_folded")) is not None


def curve(job: Job) -> Curve:
    """Epoch and test accuracy in percent, for the epochs so far."""
    try:
        with open(RunFolder(job.folder).metrics, encoding="utf-8", newline="") as file:
            return [(round(float(row["epoch"])), 100 * float(row["test_accuracy"])) for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError):
        return []


def read_json(path: Path) -> dict[str, Any]:
    """A mapping from a file, or an empty one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or None.

    >>> number(3), number("3"), number(float("nan")), number(None)
    (3.0, None, None, None)
    """
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else None
