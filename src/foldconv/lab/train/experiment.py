"""`fit`: one run from a config to a folder with everything in it, and the same run continued."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ...errors import CheckpointError, UnsupportedError
from ...files.atomic import write_json
from ...files.native import save
from ...network.costs import summary
from ...network.fold import fold
from ..data import ImageData, epoch_seed, evaluation_loader
from ..run import RunFolder, locked
from ..zoo import check_name
from . import processes
from .building import build, chosen_method
from .checkpoint import check_classes, open_network
from .classification import task_of
from .config import TrainConfig
from .curves import plot_curves
from .devices import device_name, launch, peak_memory, quiet_lightning, stop_processes
from .divergence import DivergedError
from .loggers import check_logger
from .loop import Training
from .optimizers import check_optimizer
from .qat import check_packages
from .records import Records, best_epoch
from .resuming import newest_readable

_UNITS = {"accuracy": "share of images", "miou": "mean of the classes", "map": "mean of classes and overlaps"}


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run found out; accuracies are shares of the test images (or `measure`)."""

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
    task: str = "classification"
    measure: str = "accuracy"
    """What is called accuracy above: ``accuracy``, ``miou`` or ``map``."""
    seed: int = 0
    training_seconds: float = 0.0
    """Of `seconds`, those in training epochs without validation; over all parts of a run that was cut off."""
    peak_memory: int | None = None
    """Bytes: on a GPU its tensors' maximum, else the process' maximal resident set."""
    device: str = ""
    images_skipped: int = 0
    """Images that could not be read (``corrupt_images: skip``)."""
    top5_expanded: float | None = None
    """Like the accuracies, with the five likeliest classes as the answer; None for five classes and fewer."""
    top5_folded: float | None = None
    best_epoch: int = 0
    """That of best.ckpt. It was chosen by the test images: its accuracy is no measurement on unseen ones."""
    best_accuracy: float | None = None


@dataclasses.dataclass(frozen=True)
class _Trained:
    """What training tells besides its last checkpoint."""

    rows: list[dict[str, Any]]
    training_seconds: float
    peak_memory: int | None
    device: torch.device
    devices: str


def fit(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """Train, fold, verify, and write a new run folder.

    The folder gets config.yaml, metrics.csv, last.ckpt (resumes), best.ckpt, folded.safetensors, curves.png and
    result.json.
    Seeds torch's global generator.

    A run in several processes is the last thing that its program does: in all but the first process, `fit` ends it.

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


def resume(
    folder: str | Path, console: Console | None = None, *, epochs: int | None = None, patience: int | None = None
) -> TrainResult:
    """Continue a run that was cut off, with its own config from its last checkpoint.

    It ends with the weights that it would have had undisturbed (exactly on a CPU).

    Args:
        folder: of the run.
        console: where progress is shown; standard error by default.
        epochs: more than the run was made for, where its schedule does not depend on their number: it ends with the
            weights of a run of so many from the start.
        patience: another one; 0 goes on with a run that was stopped early.

    Raises:
        CheckpointError: not a run folder, no checkpoint in it, or damaged ones only.
        UnsupportedError: another process continues it, or its schedule ends with its epochs.
        KeyboardInterrupt: after Ctrl-C; its text says how to continue.
    """
    run = RunFolder(folder)
    for there in ([run.config], run.checkpoints()):
        if not any(path.is_file() for path in there):
            raise CheckpointError(f"{run}: cannot resume here: it has no {there[0].name}")
    config = TrainConfig.load(run.config)
    changed = _changed(config, run, epochs, patience)
    with locked(run.path) if processes.is_first(config) else contextlib.nullcontext():
        if changed != config and processes.is_first(config):
            changed.save(run.config)
        return _run(changed, run, console)


def _changed(config: TrainConfig, run: RunFolder, epochs: int | None, patience: int | None) -> TrainConfig:
    """The config to go on with; a schedule that has been followed for fewer epochs would have been another one."""
    new = {"epochs": epochs, "patience": patience}
    changed = dataclasses.replace(config, **{name: value for name, value in new.items() if value is not None})
    if changed.epochs < config.epochs:
        raise UnsupportedError(f"{run}: epochs: expected {config.epochs} or more, received {changed.epochs}")
    fixed = config.schedule == "constant" or (config.schedule == "step" and "milestones" in config.schedule_args)
    if changed.epochs > config.epochs and not fixed:
        remedy = "start a new run from its weights with --pretrained and --init preserve"
        raise UnsupportedError(
            f"{run}: epochs: its schedule ({config.schedule}) is made for {config.epochs}, and would have been another "
            f"one for {changed.epochs}: expected schedule constant, or step with milestones; {remedy}"
        )
    return changed


def _run(config: TrainConfig, old: RunFolder | None, console: Console | None) -> TrainResult:
    first = processes.is_first(config)
    if old is None:
        processes.check_folder(config)
    console = (console or Console(stderr=True)) if first else Console(quiet=True)
    begin = time.perf_counter()
    # Before data are fetched or a network is built.
    check_optimizer(config)
    check_logger(config)
    check_packages(config)
    check_name(config.architecture)
    chosen_method(config)
    task = task_of(config.task)
    task.check(config)
    data = task.open_data(config)
    if data.note:
        console.print(data.note, soft_wrap=True, highlight=False)
    torch.manual_seed(epoch_seed(config.seed, -1))
    network, description = build(config, data, console)
    start = None
    if old is not None:
        path, content, damaged = newest_readable(old, config.keep)
        start = path, content
        check_classes(content, data, path)
        if first:
            for bad, error in damaged.items():
                console.print(f"{error}; continuing from {path.name}", soft_wrap=True, highlight=False)
                bad.replace(bad.with_name(f"damaged-{bad.name}"))  # or it would push out the one that can be read
    if not first:
        folder = old or RunFolder(processes.shared_folder(config))
        try:
            with _threads(config, data):
                _train(network, config, data, description, folder, start, console)
        except (DivergedError, KeyboardInterrupt):
            raise SystemExit(1) from None  # the first process says so
        raise SystemExit(0)  # the first process folds and reports
    folder = old or _new_folder(config)
    processes.share_folder(folder.path)
    try:
        with _left_in_order(folder, new=old is None), contextlib.nullcontext() if old else locked(folder.path):
            if old is None:
                config.save(folder.config)
            console.print(f"run folder: {folder}", soft_wrap=True, highlight=False)
            with _threads(config, data):
                trained = _train(network, config, data, description, folder, start, console)
                result = _finish(trained, config, data, folder)
            result = dataclasses.replace(result, seconds=round(time.perf_counter() - begin, 2))
            write_json(folder.result, dataclasses.asdict(result))
    finally:
        processes.forget_folder()
    return result


def _new_folder(config: TrainConfig) -> RunFolder:
    """Create the run folder: ``config.out``, which must not exist, or the next free name under runs/."""
    if config.out:
        folder = Path(config.out)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            remedy = "choose another, or continue it with --resume"
            raise FileExistsError(f"the run folder {folder} exists and is not overwritten; {remedy}") from None
        except OSError as error:
            raise OSError(f"the run folder {folder} cannot be made ({error.strerror}); choose another") from None
        return RunFolder(folder)
    number = 1
    while True:
        folder = Path("runs", config.run_name + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir(parents=True)
            return RunFolder(folder)
        except FileExistsError:
            number += 1


def _train(
    network: nn.Module,
    config: TrainConfig,
    data: ImageData,
    description: dict[str, Any],
    folder: RunFolder,
    start: tuple[Path, dict[str, Any]] | None,
    console: Console,
) -> _Trained:
    with quiet_lightning():
        fabric = launch(config)
        try:
            training = Training(network, config, data, fabric, folder.checkpoint, start)
            records = Records(training, description, folder, console, start)
            while not records.stopped:
                records.epoch()
            records.close()
            if training.epoch < config.epochs:
                told = f"stopped after epoch {training.epoch} of {config.epochs}: the test {training.task.label} has "
                told += f"not risen since epoch {records.best_epoch} (patience: {config.patience})"
                console.print(told, soft_wrap=True, highlight=False)
        except BaseException:
            stop_processes(fabric)
            raise
    used = peak_memory(fabric.device)
    name = device_name(fabric.device, fabric.world_size)
    return _Trained(records.rows, round(training.seconds, 3), used, fabric.device, name)


def _finish(trained: _Trained, config: TrainConfig, data: ImageData, folder: RunFolder) -> TrainResult:
    """Fold the trained network, prove that nothing changed, write what is deployed.

    The network is that of the last checkpoint, as `foldconv fold last.ckpt` opens it: whole, in float32 and on the
    processor, whatever it was split into, computed in and compiled to while it trained; its average where there is one.
    """
    network, description = open_network(folder.checkpoint, trusted=config.architecture)
    folded = fold(network, blocks=False).eval()  # the architecture, with its keys
    save(folded, folder.folded, extra={key: value for key, value in description.items() if key != "layers"})
    task = task_of(config.task)
    plot_curves(trained.rows, folder.curves, config.run_name, (task.measure, _UNITS[task.measure]))
    images = next(iter(evaluation_loader(data)))[0]
    if isinstance(images, list):  # they differ in size
        images = images[0].unsqueeze(0)
    cost = summary(network, images[:1])
    difference = task.verify(network, folded, images, blocks=False).max_error
    task.draw(folded, data, folder.predictions)
    # last, and where training was: a large test set takes hours on a processor
    where: dict[str, Any] = {"device": trained.device, "workers": config.workers}
    found, plain = (task.evaluate(each, data, **where) for each in (network, folded))
    best = best_epoch(trained.rows, task.measure)
    return TrainResult(
        run=str(folder),
        data=config.data,
        architecture=config.architecture,
        method=config.method,
        epochs=len(trained.rows),
        accuracy_expanded=found[task.measure],
        accuracy_folded=plain[task.measure],
        max_output_difference=float(difference),
        parameters_training=cost.parameters_training,
        parameters_folded=cost.parameters_folded,
        macs_training=cost.macs_training,
        macs_folded=cost.macs_folded,
        seconds=0.0,
        task=config.task,
        measure=task.measure,
        seed=config.seed,
        training_seconds=trained.training_seconds,
        peak_memory=trained.peak_memory,
        device=trained.devices,
        images_skipped=int(getattr(data, "images_skipped", 0)),
        top5_expanded=found.get("top5_accuracy"),
        top5_folded=plain.get("top5_accuracy"),
        best_epoch=best,
        best_accuracy=trained.rows[best - 1][f"test_{task.measure}"] if best else None,
    )


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
def _left_in_order(folder: RunFolder, new: bool) -> Iterator[None]:
    """A run that fails before its first checkpoint leaves no folder behind; one cut off later says how to go on."""
    try:
        yield
    except BaseException as error:
        if folder.checkpoint.exists():
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"stopped; continue with: foldconv train --resume {folder}") from None
        elif new:
            for file in (folder.config, folder.lock):
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is in it: not ours to remove
                folder.path.rmdir()
        raise
