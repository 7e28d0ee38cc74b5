"""Lightning's Trainer as a `TrainConfig` asks for it, quiet, and leaving Ctrl-C as it found it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ...errors import UnsupportedError
from .config import TrainConfig
from .resuming import SafeCheckpointIO
from .sharding import ShardedStrategy


def make_trainer(config: TrainConfig, folder: Path, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A trainer that writes nothing but what its callbacks do (and TensorBoard's logs where they are asked for).

    Raises:
        UnsupportedError: an accelerator, strategy or precision that is not there, or no tensorboard.
    """
    logger: Any = False
    if config.tensorboard:
        if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
            raise UnsupportedError(
                'tensorboard: true needs the package tensorboard; install it: pip install "foldconv[tensorboard]"'
            )
        from lightning.pytorch.loggers import TensorBoardLogger

        logger = TensorBoardLogger(folder, name=None, version="tensorboard")
    if config.track_branches and config.strategy.startswith("fsdp"):
        raise UnsupportedError(
            "track_branches: fsdp splits the kernels it would look at; expected strategy: ddp with it, "
            f"received {config.strategy}; foldconv inspect last.ckpt --branches looks at a checkpoint"
        )
    try:
        trainer = pl.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.nodes,
            strategy=ShardedStrategy() if config.strategy == "fsdp" else config.strategy,
            precision=config.precision,  # pyright: ignore[reportArgumentType]
            sync_batchnorm=config.sync_batchnorm,
            max_epochs=config.epochs,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.clip_gradient or None,
            callbacks=callbacks,
            plugins=[SafeCheckpointIO(config.keep)],
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the loaders know their process' share
        )
    except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
        raise UnsupportedError(_settings(config, error)) from None
    if trainer.strategy.root_device.type == "cpu":
        _check_cpu(config, trainer.world_size)
    return trainer


def _check_cpu(config: TrainConfig, processes: int) -> None:
    """What Lightning would replace, or torch refuse in the middle of the first step."""
    if config.precision == "16-mixed":
        raise UnsupportedError("precision: 16-mixed needs a GPU; on a CPU expected bf16-mixed or 32-true")
    if config.sync_batchnorm and processes > 1:
        raise UnsupportedError(
            f"sync_batchnorm: torch joins batch norms on GPUs only; on a CPU with {processes} processes expected false"
        )


def _settings(config: TrainConfig, error: Exception) -> str:
    given = ", ".join(
        f"{name}: {getattr(config, name)}" for name in ("accelerator", "devices", "strategy", "precision", "nodes")
    )
    return f"Lightning does not take {given}: {' '.join(str(error).split())}"


def device_name(device: torch.device, count: int) -> str:
    """What trained, in words.

    >>> device_name(torch.device("cpu"), 2)
    '2 x cpu'
    """
    name = f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
    return f"{count} x {name}" if count > 1 else name


def peak_memory(device: torch.device) -> int | None:
    """The most memory in use so far, in bytes: CUDA's tensors, else the whole process; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide Lightning's notes on hardware, loader workers and its other products; errors are raised as ever."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", category=UserWarning, message=".*does not have many workers")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextlib.contextmanager
def restored_interrupt_handler() -> Iterator[None]:
    """Lightning ignores further Ctrl-C after the first and leaves it so; the caller's handler comes back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
