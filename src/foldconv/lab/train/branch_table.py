"""The file branches.csv: its columns, and reading it back."""

from __future__ import annotations

import csv
import os
from typing import Any

from ...errors import CheckpointError

Row = dict[str, Any]
COLUMNS: tuple[str, ...] = ("epoch", "layer", "branch", "share", "norm", "similarity", "identity_distance", "groups")
"""Similarity is the branch's mean with the layer's other branches; the last two are the layer's, once per branch.

What `foldconv.branches` has as None is empty.
"""
_TEXTS = {"layer", "branch"}


def read_branches(path: str | os.PathLike[str]) -> list[Row]:
    """The rows that `BranchHistory` wrote: numbers as numbers, what is empty as None.

    Raises:
        CheckpointError: another file, or a damaged one.
        OSError: it cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     _ = file.write(",".join(COLUMNS) + "\\n1,conv1,D,0.25,0.5,,0.125,\\n")
        ...     file.flush()
        ...     read_branches(file.name)[0]["share"], read_branches(file.name)[0]["groups"]
        (0.25, None)
    """
    with open(path, newline="", encoding="utf-8") as file:
        try:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                received = ",".join(reader.fieldnames or ()) or "nothing"
                raise CheckpointError(
                    f"{path}: not a file of branches: expected the columns {','.join(COLUMNS)}, received {received}"
                )
            return [{name: _value(name, row[name]) for name in COLUMNS} for row in reader]
        except (ValueError, TypeError, csv.Error) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: damaged, a row does not fit its columns: {error}") from None


def _value(name: str, text: str | None) -> Any:
    if text is None:
        raise ValueError(f"no {name}")
    if name in _TEXTS:
        return text
    if not text:
        return None
    return int(text) if name in ("epoch", "groups") else float(text)
