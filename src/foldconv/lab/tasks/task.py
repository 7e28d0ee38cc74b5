"""`Task`: what training, evaluation and the command line ask about what a network is for."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError, shown
from ...layers.once import composed_once
from ...network.fold import fold
from ...network.tree import evaluation
from ...network.verify import Report, verify
from ..data import ImageData, evaluation_loader
from .module import TaskModule

Total = Callable[..., list[float]]
"""Adds each of several numbers up over all processes."""


def own(*numbers: float) -> list[float]:
    """The total of a single process: the numbers themselves.

    >>> own(1, 2)
    [1, 2]
    """
    return list(numbers)


def check_unused(task: str, config: Any, **usual: Any) -> None:
    """Refuse a `TrainConfig` in which an option that a task does not have is set.

    Raises:
        UnsupportedError: naming it.
    """
    for name, value in usual.items():
        if getattr(config, name) != value:
            usually = shown(value) if value is None or value != "" else "none"
            raise UnsupportedError(
                f"{name}: {task} has no such option; expected {usually}, received {shown(getattr(config, name))}"
            )


class Task:
    """One kind of question to a network: its data, its loss, how good its answers are, and how they look."""

    name: str
    measure: str
    """What says how good a network is; a share between 0 and 1."""
    label: str
    """The measure as texts call it."""
    columns: tuple[str, ...]
    """Of a run's metrics.csv."""
    optional: tuple[str, ...] = ()
    """Columns that not every run has."""

    def check(self, config: Any) -> None:
        """Refuse what a `TrainConfig` asks for and the task has not.

        Raises:
            UnsupportedError: naming the option.
        """

    def open_data(self, config: Any) -> ImageData:
        """The set that a `TrainConfig` names."""
        raise NotImplementedError

    def options(self, config: Any, data: ImageData) -> dict[str, Any]:
        """The architecture's options that follow from the data."""
        return {"num_classes": data.num_classes}

    def module(self, network: nn.Module, config: Any, data: ImageData) -> TaskModule:
        """The network with its loss."""
        raise NotImplementedError

    def check_network(self, network: nn.Module, data: ImageData, name: str) -> None:
        """Refuse a plain network that fails on the test images, before it is trained for hours; `name` is its own.

        Raises:
            UnsupportedError: with their size and the reason.
        """

    def training_inputs(self, images: Tensor) -> Any:
        """What the network is called with in training, as of `foldconv.expand`'s `example_inputs`."""
        return images

    def inputs(self, images: Tensor) -> Any:
        """What the network is called with in evaluation, as of `foldconv.verify`'s `inputs`."""
        return images

    def verify(self, before: nn.Module, after: nn.Module, images: Tensor, **options: Any) -> Report:
        """`foldconv.verify` of a network and its fold on a batch of images; `options` are those of that fold."""
        return verify(before, after, self.inputs(images))

    def score(
        self, outputs_of: Callable[[Any], Any], batches: Iterable[Any], data: ImageData, total: Total = own
    ) -> dict[str, float]:
        """How good outputs are on batches of images and targets, the measure among it."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(
        self, network: nn.Module, data: ImageData, *, device: str | torch.device = "cpu", workers: int = 0
    ) -> dict[str, Any]:
        """`score` on the test images, and ``images``, how many there are; the network is moved to `device`."""
        network = network.to(device)
        with evaluation(network) as running, composed_once(running):
            found: dict[str, Any] = self.score(running, evaluation_loader(data, device=device, workers=workers), data)
        return {**found, "images": len(data.test)}  # pyright: ignore[reportArgumentType]

    def check_export(self, subject: Any) -> None:
        """Refuse to export what no runtime's format of ours takes; `subject` is the file, for the message."""

    def read(self, image: Any, description: Mapping[str, Any]) -> Tensor:
        """An image of PIL as the network sees it in evaluation, (1, C, H, W)."""
        raise NotImplementedError

    def answers(self, output: Any, classes: Sequence[str]) -> list[dict[str, Any]]:
        """What a network says about one image, as plain values."""
        raise NotImplementedError

    def painted(self, image: Tensor, output: Any, classes: Sequence[str]) -> Tensor:
        """An image (uint8, 3×H×W) with an output, or a target, drawn onto it."""
        raise NotImplementedError

    def draw(self, network: nn.Module, data: ImageData, path: str | os.PathLike[str]) -> None:
        """A picture of test images, their targets and a network's answers, if the task has any."""


def folded_in_double(network: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A network's copy in float64, and that copy's fold; `options` are `foldconv.fold`'s."""
    double = copy.deepcopy(network).double().eval()
    if isinstance(options.get("example_inputs"), tuple):
        options["example_inputs"] = ([image.double() for image in options["example_inputs"][0]],)
    return double, fold(double, **options)
