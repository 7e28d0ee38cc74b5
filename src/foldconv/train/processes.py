"""One run in several processes: the first one makes the folder and writes, the others only train."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UnsupportedError

_FOLDER = "FOLDCONV_RUN_FOLDER"
"""Lightning starts the other processes of a machine with the first one's command and environment."""


def is_first() -> bool:
    """Whether this process was started by a user (or is the first that a launcher such as torchrun started)."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0" and os.environ.get("NODE_RANK", "0") == "0"


def share_folder(folder: Path) -> None:
    """Tell the processes that this one is going to start where the run's folder is."""
    os.environ[_FOLDER] = str(folder)


def forget_folder() -> None:
    """The run is over: a next one in this process has another folder."""
    os.environ.pop(_FOLDER, None)


def shared_folder(out: str | None) -> Path:
    """The folder that the first process made.

    Raises:
        UnsupportedError: neither the first process nor the config says where.
    """
    told = os.environ.get(_FOLDER) or out
    if not told:
        raise UnsupportedError("a run on several machines needs a name for its folder that all of them know: set out")
    return Path(told)


def share_of_batch(batch_size: int, processes: int) -> int:
    """How many of a step's images each process gets.

    Raises:
        UnsupportedError: they cannot get equally many.
    """
    if batch_size % processes or batch_size // processes < 2:
        raise UnsupportedError(
            f"batch_size: expected a multiple of the number of processes ({processes}), at least 2 images for each, "
            f"received {batch_size}"
        )
    return batch_size // processes
