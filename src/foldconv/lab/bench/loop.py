"""What the loop of `foldconv train` costs beside one that does nothing but train."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from ..run import RunFolder
from ..train.building import build
from ..train.config import PLAIN, TrainConfig
from ..train.devices import launch, quiet_lightning
from ..train.loop import Training
from ..train.records import Records
from .config import BenchConfig

BARE = "bare loop"
TRAIN = "foldconv train"
IMAGES = 6400
"""Of an epoch. What an epoch has besides steps (metrics, a checkpoint) weighs more than in an epoch of a data set."""


def epochs(
    config: BenchConfig,
    network: nn.Module,
    batch: int,
    shape: Sequence[int],
    classes: int,
    rounds: int,
    seconds: Callable[[Callable[[], object]], float],
) -> dict[str, list[float]]:
    """Seconds of an epoch of each, round by round; one more round comes before and is not counted.

    Args:
        config: its network, device, precision and memory format.
        network: the same, built; it stays as it is.
        batch: images per step.
        shape: of an image, ``(channels, height, width)``.
        classes: the network's outputs.
        rounds: samples of each.
        seconds: the time of a call.
    """
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (max(IMAGES // batch, 1) * batch, *shape[1:], shape[0]), dtype=np.uint8)
    labels = generator.integers(0, classes, len(images))
    found: dict[str, list[float]] = {BARE: [], TRAIN: []}
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        data = Path(folder, "images.npz")
        sets = {"x_train": images, "y_train": labels, "x_test": images[:batch], "y_test": labels[:batch]}
        np.savez(data, **sets, classes=np.array([str(n) for n in range(classes)]))
        settings = TrainConfig(
            data=str(data),
            augmentation="none",
            architecture=config.network,
            method=PLAIN,
            epochs=rounds + 1,
            batch_size=batch,
            schedule="constant",
            lr=0.01,
            accelerator="gpu" if config.device == "cuda" else "cpu",
            channels_last=config.channels_last,
            precision="bf16-mixed" if config.amp else "32-true",
        )
        opened, run = settings.open_data(), RunFolder(folder)
        trained, description = build(settings, opened)
        training = Training(trained, settings, opened, launch(settings), run.checkpoint)
        records = Records(training, description, run, Console(quiet=True))
        loops = {BARE: _bare(config, network, images, labels, batch), TRAIN: records.epoch}
        for number in range(rounds + 1):
            for name, epoch in loops.items():
                taken = seconds(epoch)
                if number:
                    found[name].append(taken)
    return found


def _bare(
    config: BenchConfig, network: nn.Module, images: np.ndarray, labels: np.ndarray, batch: int
) -> Callable[[], None]:
    """An epoch of the loop of examples/mnist_pytorch.py."""
    network = copy.deepcopy(network).train()
    x = torch.from_numpy(images).movedim(-1, 1).to(config.device, torch.float32).div_(255).contiguous()
    x = x.to(memory_format=torch.channels_last) if config.channels_last else x
    y = torch.from_numpy(labels).to(config.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def epoch() -> None:
        for chosen in torch.randperm(len(x), device=config.device).split(batch):
            with torch.autocast(config.device, torch.bfloat16, enabled=config.amp):
                loss = F.cross_entropy(network(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch
