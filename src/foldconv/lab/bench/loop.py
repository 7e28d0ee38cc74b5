"""What `foldconv.train.fit` costs beside a loop that does nothing but train."""

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

from ..train.config import PLAIN, TrainConfig
from ..train.experiment import fit
from .config import BenchConfig

BARE = "bare loop"
TRAIN = "foldconv train"
STEPS = 100
"""Steps of an epoch."""
LONG = 3
"""Epochs of the longer of two runs, whose difference is the epochs alone: not the start, the fold, the report."""


def epochs(
    config: BenchConfig,
    network: nn.Module,
    batch: int,
    shape: Sequence[int],
    classes: int,
    rounds: int,
    seconds: Callable[[Callable[[], object]], float],
) -> dict[str, list[float]]:
    """Seconds of an epoch of each, round by round; the first round is not counted.

    Args:
        config: its network, device and memory format.
        network: the same, built.
        batch: images per step.
        shape: of an image, ``(channels, height, width)``.
        classes: the network's outputs.
        rounds: samples of each.
        seconds: the time of a call.

    Raises:
        UnsupportedError: from `fit`.
    """
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (STEPS * batch, *shape[1:], shape[0]), dtype=np.uint8)
    labels = generator.integers(0, classes, len(images))
    found: dict[str, list[float]] = {BARE: [], TRAIN: []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "images.npz")
        sets = {"x_train": images, "y_train": labels, "x_test": images[:batch], "y_test": labels[:batch]}
        np.savez(data, **sets, classes=np.array([str(n) for n in range(classes)]))
        for number in range(rounds + 1):

            def train(epochs: int, number: int = number) -> None:
                settings = TrainConfig(
                    data=str(data),
                    augmentation="none",
                    architecture=config.network,
                    method=PLAIN,
                    epochs=epochs,
                    batch_size=batch,
                    schedule="constant",
                    lr=0.01,
                    accelerator="gpu" if config.device == "cuda" else "cpu",
                    threads=torch.get_num_threads(),
                    channels_last=config.channels_last,
                    precision="bf16-mixed" if config.amp else "32-true",
                    out=str(Path(folder, f"{number}-{epochs}")),
                )
                fit(settings, Console(quiet=True))

            bare = seconds(lambda: _bare(config, network, images, labels, batch, LONG - 1))
            long, short = seconds(lambda: train(LONG)), seconds(lambda: train(1))
            if number:
                found[BARE].append(bare / (LONG - 1))
                found[TRAIN].append((long - short) / (LONG - 1))
    return found


def _bare(
    config: BenchConfig, network: nn.Module, images: np.ndarray, labels: np.ndarray, batch: int, epochs: int
) -> None:
    """The loop of examples/mnist_pytorch.py."""
    network = copy.deepcopy(network).train()
    x = torch.from_numpy(images).movedim(-1, 1).to(config.device, torch.float32).div_(255).contiguous()
    x = x.to(memory_format=torch.channels_last) if config.channels_last else x
    y = torch.from_numpy(labels).to(config.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), device=config.device).split(batch):
            with torch.autocast(config.device, torch.bfloat16, enabled=config.amp):
                loss = F.cross_entropy(network(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
