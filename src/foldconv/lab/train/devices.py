"""The devices and processes that a `TrainConfig` asks for: Lightning's Fabric, quiet."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ...errors import UnsupportedError
from .config import TrainConfig
from .processes import share_of_batch
from .sharding import ShardedStrategy

_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ShardedStrategy)


def launch(config: TrainConfig) -> Fabric:
    """Lightning's Fabric on the devices that a config asks for; the other processes are started.

    Raises:
        UnsupportedError: an accelerator, strategy or precision that is not there, or a batch that cannot be shared.
    """
    if config.track_branches and config.strategy.startswith("fsdp"):
        raise UnsupportedError(
            "track_branches: fsdp splits the kernels it would look at; expected strategy: ddp with it, "
            f"received {config.strategy}; foldconv inspect last.ckpt --branches looks at a checkpoint"
        )
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.nodes,
            strategy=ShardedStrategy() if config.strategy == "fsdp" else config.strategy,
            precision=config.precision,  # pyright: ignore[reportArgumentType]
        )
    except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
        raise UnsupportedError(_settings(config, error)) from None
    launcher = fabric.strategy.launcher
    if type(fabric.strategy) not in _STRATEGIES or isinstance(launcher, _MultiProcessingLauncher):
        raise UnsupportedError(
            f"strategy: expected auto, ddp or fsdp, and in a notebook devices: 1, received {config.strategy} with "
            f"devices: {config.devices}"
        )
    if fabric.device.type == "cpu":
        _check_cpu(config, fabric.world_size)
    share_of_batch(config.batch_size, fabric.world_size)  # or each process that is started says what is wrong
    fabric.launch()
    return fabric


def stop_processes(fabric: Fabric) -> None:
    """End those that `launch` started: they would wait for this one, which goes no further."""
    started = getattr(fabric.strategy.launcher, "procs", [])
    ended = started.copy()
    started.clear()  # or Lightning, which looks after them, would kill this process for their end
    for process in ended:
        process.kill()
        process.wait()


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
