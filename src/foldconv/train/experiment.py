"""`fit`: one run from a config to a folder with everything in it, and the same run continued."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from .._files import atomic_path
from ..errors import CheckpointError
from ..folding import fold
from ..inspection import summary
from ..serialization import save
from ..verification import verify
from .callbacks import EpochProgress, EpochSeed, LastCheckpoint, MetricsTable, SafeCheckpointIO
from .checkpoint import build
from .classifier import Classifier
from .config import TrainConfig
from .curves import plot_curves
from .data import ImageData, create_data, epoch_seed, evaluation_loader, training_loader
from .evaluation import evaluate

CHECKPOINT, CONFIG, METRICS, FOLDED, CURVES, RESULT = (
    "last.ckpt",
    "config.yaml",
    "metrics.csv",
    "folded.safetensors",
    "curves.png",
    "result.json",
)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run found out; accuracies are shares of the test images."""

    run: str
    data: str
    architecture: str
    method: str
    epochs: int
    accuracy_expanded: float
    accuracy_folded: float
    max_output_difference: float
    parameters_training: int
    parameters_folded: int
    macs_training: int | None
    macs_folded: int | None
    seconds: float


def fit(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """Train, fold, verify, and write a new run folder.

    The folder gets config.yaml, metrics.csv, last.ckpt (resumes), folded.safetensors, curves.png and result.json.
    Seeds torch's global generator.

    Args:
        config: the run.
        console: where progress is shown; standard error by default.

    Raises:
        FileExistsError: ``config.out`` exists.
        UnsupportedError: an unknown data set, architecture or method.
        NoMatchError: the method applies to no convolution of the network.
        FoldMismatchError: the weights diverged; the folder stays.
        KeyboardInterrupt: after Ctrl-C; its text says how to continue.
    """
    return _run(config, None, console)


def resume(folder: str | Path, console: Console | None = None) -> TrainResult:
    """Continue a run that was cut off, with its own config from its last checkpoint.

    It ends with the weights that it would have had undisturbed (exactly on a CPU).

    Raises:
        CheckpointError: not a run folder, no checkpoint in it, or a damaged one.
        KeyboardInterrupt: after Ctrl-C; its text says how to continue.
    """
    for name in (CONFIG, CHECKPOINT):
        if not Path(folder, name).is_file():
            raise CheckpointError(f"{folder}: cannot resume here: it has no {name}")
    return _run(TrainConfig.load(Path(folder, CONFIG)), Path(folder), console)


def _run(config: TrainConfig, old: Path | None, console: Console | None) -> TrainResult:
    console = Console(stderr=True) if console is None else console
    begin = time.perf_counter()
    data = create_data(config.data)
    torch.manual_seed(epoch_seed(config.seed, -1))
    network, description = build(config, data)
    folder = old or _new_folder(config)
    with _left_in_order(folder, new=old is None):
        if old is None:
            config.save(folder / CONFIG)
        console.print(f"run folder: {folder}", soft_wrap=True, highlight=False)
        with _threads(config, data):
            rows = _train(network, config, data, description, folder, old is not None, console)
            result = _finish(network, config, data, description, folder, rows)
        result = dataclasses.replace(result, seconds=round(time.perf_counter() - begin, 2))
        with atomic_path(folder / RESULT) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8")
    return result


def _new_folder(config: TrainConfig) -> Path:
    """Create the run folder: ``config.out``, which must not exist, or the next free name under runs/."""
    if config.out:
        folder = Path(config.out)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            remedy = "choose another, or continue it with --resume"
            raise FileExistsError(f"the run folder {folder} exists and is not overwritten; {remedy}") from None
        return folder
    number = 1
    while True:
        folder = Path("runs", config.run_name + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def _train(
    network: nn.Module,
    config: TrainConfig,
    data: ImageData,
    description: dict[str, Any],
    folder: Path,
    continued: bool,
    console: Console,
) -> list[dict[str, float]]:
    metrics = MetricsTable(folder / METRICS)
    with _quiet_lightning():
        trainer = pl.Trainer(
            accelerator=config.accelerator,
            devices=1,
            max_epochs=config.epochs,
            callbacks=[EpochSeed(config.seed), metrics, EpochProgress(console), LastCheckpoint(folder / CHECKPOINT)],
            plugins=[SafeCheckpointIO()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        loader: DataLoader = training_loader(
            data, config.batch_size, config.seed, epoch=lambda: trainer.global_step // len(loader)
        )
        module = Classifier(network, config, data.num_classes, description)
        with _restored_interrupt_handler():
            try:
                trainer.fit(
                    module, loader, evaluation_loader(data), ckpt_path=str(folder / CHECKPOINT) if continued else None
                )
            except SystemExit:  # what Lightning makes of Ctrl-C
                if not trainer.interrupted:
                    raise
        if trainer.interrupted:
            raise KeyboardInterrupt
    return metrics.rows


def _finish(
    network: nn.Module,
    config: TrainConfig,
    data: ImageData,
    description: dict[str, Any],
    folder: Path,
    rows: list[dict[str, float]],
) -> TrainResult:
    """Fold the trained network, prove that nothing changed, write what is deployed."""
    network.cpu().eval()
    folded = fold(network).eval()
    save(folded, folder / FOLDED, extra={key: value for key, value in description.items() if key != "layers"})
    plot_curves(rows, folder / CURVES, title=config.run_name)
    images = next(iter(evaluation_loader(data)))[0]
    cost = summary(network, images[:1])
    return TrainResult(
        run=str(folder),
        data=config.data,
        architecture=config.architecture,
        method=config.method,
        epochs=config.epochs,
        accuracy_expanded=evaluate(network, data)["accuracy"],
        accuracy_folded=evaluate(folded, data)["accuracy"],
        max_output_difference=float(verify(network, folded, images).max_error),
        parameters_training=cost.parameters_training,
        parameters_folded=cost.parameters_folded,
        macs_training=cost.macs_training,
        macs_folded=cost.macs_folded,
        seconds=0.0,
    )


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
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
def _restored_interrupt_handler() -> Iterator[None]:
    """Lightning ignores further Ctrl-C after the first and leaves it so; the caller's handler comes back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _threads(config: TrainConfig, data: ImageData) -> Iterator[None]:
    """As many as the config says. On small images more than one gains nothing, and loses much on a busy machine:
    the default run takes 5 s on two idle cores with one thread or two, on busy ones 7 s with one and up to 60 s with
    two, which wait for each other at each layer.
    """
    before = torch.get_num_threads()
    height, width = data.input_shape[1:]
    torch.set_num_threads(config.threads or (1 if height * width < 32 * 32 else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _left_in_order(folder: Path, new: bool) -> Iterator[None]:
    """A run that fails before its first checkpoint leaves no folder behind; one cut off later says how to go on."""
    try:
        yield
    except BaseException as error:
        if (folder / CHECKPOINT).exists():
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"stopped; continue with: foldconv train --resume {folder}") from None
        elif new:
            (folder / CONFIG).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is in it: not ours to remove
                folder.rmdir()
        raise
