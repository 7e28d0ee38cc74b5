"""One run in several processes: the first one makes the folder and writes, the others only train."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from ...errors import UnsupportedError
from .config import TrainConfig

_FOLDER = "FOLDCONV_RUN_FOLDER"
"""Lightning starts the other processes of a machine with the first one's command and environment."""


def is_first(config: TrainConfig) -> bool:
    """Whether this process makes the run's folder and reports.

    It is the one that a user started; of those that torchrun, Slurm or the users of several machines started, it is
    the one with number 0.

    >>> is_first(TrainConfig())
    True
    """
    if config.devices == 1 and config.nodes == 1:
        return True
    if not TorchElasticEnvironment.detect() and _of_slurm():
        return os.environ["SLURM_PROCID"] == "0"
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0" and os.environ.get("NODE_RANK", "0") == "0"


def check_folder(config: TrainConfig) -> None:
    """Processes that the first one does not start itself can only know the run's folder from the config.

    All of them ask, so that none waits for another that has refused.

    Raises:
        UnsupportedError: the config does not say.
    """
    count = os.environ["SLURM_NTASKS"] if _of_slurm() else os.environ.get("WORLD_SIZE", "1")
    started_elsewhere = config.nodes > 1 or (config.devices != 1 and int(count) > 1)
    if started_elsewhere and not (config.out or _FOLDER in os.environ):
        raise UnsupportedError(
            "out: a run whose processes torchrun, Slurm or several machines start needs a folder that all of them "
            "know; expected a path, received none"
        )


def _of_slurm() -> bool:
    """Whether Lightning would let Slurm say which process this is; `srun` gives each its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that srun is there and was not used: Lightning says so later
        return SLURMEnvironment.detect() and "SLURM_PROCID" in os.environ


def share_folder(folder: Path) -> None:
    """Tell the processes that this one is going to start where the run's folder is."""
    os.environ[_FOLDER] = str(folder)


def forget_folder() -> None:
    """The run is over: a next one in this process has another folder."""
    os.environ.pop(_FOLDER, None)


def shared_folder(config: TrainConfig) -> Path:
    """The folder that the first process made; `check_folder` has looked that somebody says which."""
    return Path(os.environ.get(_FOLDER) or config.out or "")


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


def summed(fabric: Any, *numbers: float) -> list[float]:
    """Each number added up over all processes of Lightning's `fabric`."""
    if fabric.world_size == 1:
        return list(numbers)
    return fabric.all_reduce(torch.tensor(numbers, dtype=torch.float64, device=fabric.device), reduce_op="sum").tolist()
