"""Logs for the pages that people watch their runs on, written by Lightning's loggers."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError, install
from ...files.atomic import write_json
from ..run import RunFolder
from .config import TrainConfig

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}


def check_logger(config: TrainConfig) -> None:
    """Refuse a config that asks for logs that cannot be written, before anything is loaded or written.

    Raises:
        UnsupportedError: naming the package that is missing.
    """
    name = config.logger
    packages = _PACKAGES.get(name, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        remedy = install(name) if name == "tensorboard" else f"pip install {name}"
        raise UnsupportedError(f"logger: {name} needs the package {packages[0]}; install it: {remedy}")


def open_logger(config: TrainConfig, folder: RunFolder, rows: list[dict[str, Any]], steps: int) -> Any:
    """The logger that a config names, None for none; a resumed run goes on in its own log.

    Args:
        config: with ``logger``.
        folder: of the run. What is logged lies in it, unless the services' own settings (``WANDB_*``,
            ``MLFLOW_TRACKING_URI``) say otherwise.
        rows: of the epochs that are done.
        steps: of an epoch.
    """
    if config.logger == "none":
        return None
    if config.logger == "tensorboard":
        from lightning.fabric.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(folder.path, name="", version="tensorboard")
    if config.logger == "csv":
        from lightning.fabric.loggers.csv_logs import CSVLogger

        Path(folder.path, "csv", "metrics.csv").unlink(missing_ok=True)  # Lightning would, without writing them anew
        logger: Any = CSVLogger(folder.path, name="", version="csv")
        for row in rows:
            logger.log_metrics(row, step=row["epoch"] * steps)
        return logger
    known = _known(folder)
    logger, identity = _SERVICES[config.logger](folder, known)
    if known is None:
        logger.log_hyperparams(config.to_dict())
        write_json(folder.logger, {"id": identity})
    return logger


def _wandb(folder: RunFolder, known: str | None) -> tuple[Any, str]:
    from lightning.pytorch.loggers import WandbLogger

    project = os.environ.get("WANDB_PROJECT", "foldconv")
    options: dict[str, Any] = {"id": known, "resume": "allow"}
    logger: Any = WandbLogger(name=folder.path.name, project=project, save_dir=folder.path, **options)
    return logger, str(logger.experiment.id)


def _mlflow(folder: RunFolder, known: str | None) -> tuple[Any, str]:
    from lightning.pytorch.loggers import MLFlowLogger

    where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.path.resolve() / 'mlflow.db'}"
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "foldconv")
    logger: Any = MLFlowLogger(experiment, folder.path.name, where, run_id=known)
    return logger, str(logger.run_id)


_SERVICES: dict[str, Callable[[RunFolder, str | None], tuple[Any, str]]]
_SERVICES = {"wandb": _wandb, "mlflow": _mlflow}


def _known(folder: RunFolder) -> str | None:
    """What the service called the run before it was cut off."""
    try:
        return json.loads(folder.logger.read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
