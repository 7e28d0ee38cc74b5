"""Classification as a `Task`, and `task_of`: which task a config or a file is for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedError
from ..data import ImageData
from ..tasks.detection import Detection
from ..tasks.segmentation import Segmentation
from ..tasks.task import Task, Total, own
from .classifier import Classifier
from .evaluation import TOP, evaluate, score


class Classification(Task):
    """One of several classes for each image."""

    name, measure, label = "classification", "accuracy", "accuracy"
    optional = ("test_top5_accuracy",)
    columns = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", *optional, "lr")

    def open_data(self, config: Any) -> ImageData:
        """The set that a `TrainConfig` names; raises what `create_data` does."""
        return config.open_data()

    def options(self, config: Any, data: ImageData) -> dict[str, Any]:
        """The numbers of classes and of channels."""
        return {"num_classes": data.num_classes, "in_channels": data.input_shape[0]}

    def module(self, network: nn.Module, config: Any, data: ImageData) -> Classifier:
        """The network with its cross-entropy."""
        return Classifier(network, config, data.num_classes)

    def score(
        self, outputs_of: Callable[[Any], Any], batches: Iterable[Any], data: ImageData, total: Total = own
    ) -> dict[str, float]:
        """``loss`` and ``accuracy``; with more than five classes ``top5_accuracy``, too."""
        loss, right, among, images = total(*score(outputs_of, batches))
        found = {"loss": loss / images, "accuracy": right / images}
        return found | ({"top5_accuracy": among / images} if data.num_classes > TOP else {})

    def evaluate(
        self, network: nn.Module, data: ImageData, *, device: str | torch.device = "cpu", workers: int = 0
    ) -> dict[str, Any]:
        """What `foldconv.train.evaluate` gives."""
        return evaluate(network, data, device=device, workers=workers)


_TASKS: dict[str, Task] = {task.name: task for task in (Classification(), Segmentation(), Detection())}


def task_of(name: Any) -> Task:
    """The task of a config's or a description's name for it.

    Raises:
        UnsupportedError: nobody knows it.

    >>> task_of("segmentation").measure
    'miou'
    """
    if not isinstance(name, str) or name not in _TASKS:
        raise UnsupportedError(f"task: expected one of {', '.join(_TASKS)}, received {name!r}")
    return _TASKS[name]
