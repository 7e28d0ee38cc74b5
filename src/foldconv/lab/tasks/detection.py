"""Detection: boxes and their classes, by torchvision's detectors."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UnsupportedError, install
from ...network.parameters import regularization
from ...network.verify import Report, verify
from ..data import ImageData
from .coco import coco_data
from .module import TaskModule
from .pictures import write_grid
from .task import Task, Total, check_unused, folded_in_double, own

_SHOWN = 0.5
"""Chance from which on a box is drawn."""


class Detector(TaskModule):
    """The detector's own losses, added up, plus the methods' own penalties.

    In training the network maps a list of images (3, H, W) and one of targets to a dictionary of losses; in evaluation
    a list of images to a list of dictionaries with ``boxes``, ``labels`` and ``scores``, as torchvision's do.
    """

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """What is minimized, the losses' sum in it, and nothing: boxes found in training are not compared."""
        losses = self.outputs(images, None, targets)
        if not isinstance(losses, Mapping) or not losses:
            received = type(losses).__name__
            raise UnsupportedError(f"detection: expected a network that returns its losses, received {received}")
        loss = torch.stack([each.float() for each in losses.values()]).sum()
        return loss + regularization(self.network), loss.detach(), torch.zeros((), device=loss.device)


class Detection(Task):
    """COCO's boxes, measured by the mean average precision over classes and overlaps from 0.5 to 0.95."""

    name, measure, label = "detection", "map", "mAP"
    columns = ("epoch", "train_loss", "test_map", "test_map_50", "lr")

    def check(self, config: Any) -> None:
        """Refuse options of classification, and augmentations that there are not."""
        check_unused(
            self.name,
            config,
            **{"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "qat": False, "holdout": False, "normalize": True},
            **{"compile": False, "augmentation_args": {}},
        )
        kinds = ("default", "none", "flip")
        if config.augmentation not in kinds:
            raise UnsupportedError(
                f"augmentation: expected one of {', '.join(kinds)}, received {config.augmentation!r}"
            )

    def open_data(self, config: Any) -> ImageData:
        """The folder that a `TrainConfig` names; raises what `coco_data` does."""
        return coco_data(config.data, config.augmentation != "none", config.corrupt_images == "skip")

    def options(self, config: Any, data: ImageData) -> dict[str, Any]:
        """The number of classes, the background among them, and the size that images are resized to."""
        sized = {} if config.image_size is None else {"image_size": config.image_size}
        return {"num_classes": data.num_classes, **sized}

    def module(self, network: nn.Module, config: Any, data: ImageData) -> Detector:
        """The network with its losses."""
        return Detector(network, config)

    def check_network(self, network: nn.Module, data: ImageData, name: str) -> None:
        """Refuse torchvision's detectors that learn more than boxes, whose truth is not read here.

        Raises:
            UnsupportedError: naming what they learn.
        """
        heads = getattr(network, "roi_heads", None)
        for kind in ("mask", "keypoint"):
            if getattr(heads, f"has_{kind}", bool)():
                raise UnsupportedError(
                    f"{name}: learns {kind}s beside boxes, which detection reads from no data; expected a detector of "
                    "boxes, such as torchvision/fasterrcnn_resnet50_fpn"
                )

    def training_inputs(self, images: Tensor) -> Any:
        """A list of images and a box on each; evaluation takes them, too."""
        height, width = images.shape[2:]
        box = images.new_tensor([[0.1 * width, 0.1 * height, 0.8 * width, 0.8 * height]])
        target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64, device=images.device)}
        return list(images), [target] * len(images)

    def inputs(self, images: Tensor) -> Any:
        """A list of images, the network's only argument."""
        return (list(images),)

    def verify(self, before: nn.Module, after: nn.Module, images: Tensor, **options: Any) -> Report:
        """`foldconv.verify` of a network's copy in float64 and its fold, with every box, however unlikely.

        Which boxes are kept depends on the order of their scores. In float32 a rounding error may exchange two, so that
        whole boxes differ; `after`, whose layers `fold` has compared with `before`'s, is this fold in float32.
        """
        double, folded = folded_in_double(before, **options)
        with _every_box(double), _every_box(folded):
            return verify(double, folded, self.inputs(images.double()))

    def score(
        self, outputs_of: Callable[[Any], Any], batches: Iterable[Any], data: ImageData, total: Total = own
    ) -> dict[str, float]:
        """``map``, ``map_50`` and ``map_75`` (torchmetrics, by faster-coco-eval)."""
        metric = _average_precision()
        for images, targets in batches:
            outputs = outputs_of(images)
            if not isinstance(outputs, list) or not all(isinstance(each, dict) for each in outputs):
                raise UnsupportedError(f"detection: expected a list of boxes, received {type(outputs).__name__}")
            found = [{name: _plain(value) for name, value in each.items() if name in _PARTS} for each in outputs]
            metric.update(found, [{name: _plain(value) for name, value in target.items()} for target in targets])
        values = metric.compute()
        return {name: max(0.0, float(values[name])) for name in ("map", "map_50", "map_75")}

    def check_export(self, subject: Any) -> None:
        """Refuse: a file that takes tensors and gives tensors of known sizes holds no detector."""
        raise UnsupportedError(
            f"{subject}: detection: a detector takes a list of images and gives as many boxes as it finds, which no "
            "format of foldconv's holds; `foldconv fold` writes its plain weights for torchvision's network"
        )

    def read(self, image: Any, description: Mapping[str, Any]) -> Tensor:
        """An image of PIL as the network sees it, (1, 3, H, W) in [0, 1]."""
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255

    def answers(self, output: Any, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Each box, the likeliest first."""
        boxes = output[0]
        order = boxes["scores"].argsort(descending=True, stable=True).tolist()
        return [
            {
                "class": classes[int(boxes["labels"][i])],
                "index": int(boxes["labels"][i]),
                "probability": float(boxes["scores"][i]),
                "box": [round(side, 2) for side in boxes["boxes"][i].tolist()],
            }
            for i in order
        ]

    def painted(self, image: Tensor, output: Any, classes: Sequence[str]) -> Tensor:
        """The image with the boxes that are likelier than not; `output` may be a target, too."""
        from torchvision.utils import draw_bounding_boxes

        found = output[0] if isinstance(output, list) else output
        likely = found["scores"] > _SHOWN if "scores" in found else torch.ones(len(found["boxes"]), dtype=torch.bool)
        boxes, labels = found["boxes"][likely].float().cpu(), found["labels"][likely].tolist()
        upright = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        if not upright.any():
            return image
        names = [str(classes[label]) for label, good in zip(labels, upright.tolist()) if good]
        return draw_bounding_boxes(image, boxes[upright], names, colors="lime", width=max(1, image.shape[2] // 300))

    @torch.no_grad()
    def draw(self, network: nn.Module, data: ImageData, path: str | os.PathLike[str]) -> None:
        """Up to four test images with their own boxes, and with the network's."""
        device, rows = next(network.parameters()).device, []
        for index in range(min(4, len(data.test))):  # pyright: ignore[reportArgumentType]
            image, target = data.test[index]
            output = network([data.transform(image).to(device)])
            classes = data.classes or ()
            rows.append([self.painted(image, target, classes), self.painted(image, output, classes)])
        write_grid(rows, ("truth", "network"), path)


_PARTS = ("boxes", "labels", "scores")


def _plain(value: Tensor) -> Tensor:
    return value.float().cpu() if value.is_floating_point() else value.cpu()


def _average_precision() -> Any:
    """The metric, which needs a package that torchmetrics does not bring."""
    from torchmetrics.detection import MeanAveragePrecision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            metric = MeanAveragePrecision(backend="faster_coco_eval")
        except ModuleNotFoundError as error:
            raise UnsupportedError(
                f"detection: the average precision needs faster-coco-eval; install it: {install('tasks')}"
            ) from error
    metric.warn_on_many_detections = False
    return metric


@contextlib.contextmanager
def _every_box(network: nn.Module) -> Iterator[None]:
    """Without the threshold below which torchvision's detectors drop boxes."""
    changed: list[tuple[Any, Any]] = [
        (module, module.score_thresh) for module in network.modules() if hasattr(module, "score_thresh")
    ]
    for module, _ in changed:
        module.score_thresh = 0.0
    try:
        yield
    finally:
        for module, threshold in changed:
            module.score_thresh = threshold
