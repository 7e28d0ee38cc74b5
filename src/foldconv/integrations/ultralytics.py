"""ultralytics: trainers that keep a network expanded, which YOLO builds anew from its YAML before each training.

    class Trainer(foldconv.ultralytics.FoldConvTrainer):
        method = "doconv"

    YOLO("yolo11n.yaml").train(data=..., trainer=Trainer)      # or YOLO("yolo11n.pt"); resume=True takes it, too

Training ends with ``best.folded.pt`` and ``last.folded.pt`` beside ``best.pt`` and ``last.pt``: ordinary networks that
``YOLO(...)`` loads where foldconv is not installed. ``val``, ``predict`` and ``export`` take either; ultralytics fuses
first, and an expanded network folds then. A class in a module of one's own is what several GPUs need, too: ultralytics
imports it in each process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer  # pyright: ignore[reportMissingImports]
from ultralytics.nn.tasks import load_checkpoint  # pyright: ignore[reportMissingImports]

from ..errors import CheckpointError
from ..files.atomic import atomic_path
from ..files.native import describe_layers, expand_as_described
from ..layers import Foldable
from ..methods import Method
from ..network.expand import expand
from ..network.fold import fold
from ..network.tree import foldable_layers

SUFFIX = ".folded"
"""What a folded file's name has more than that of the checkpoint."""
_OF_TRAINING = ("best_fitness", "ema", "modelopt", "optimizer", "scaler", "stopper", "updates")


class FoldConv:
    """Put before any of ultralytics' trainers: ``class Trainer(FoldConv, SegmentationTrainer): method = "repvgg"``.

    A network that is expanded already (a checkpoint of such a training) stays expanded as it is.
    """

    method: ClassVar[str | Method]
    """A name or a config, as of `foldconv.expand`."""
    options: ClassVar[dict[str, Any]] = {}
    """More arguments of `foldconv.expand`: ``include``, ``exclude``, ``where``, ``init``."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        """The network of the YAML with the weights, expanded.

        Raises:
            NoMatchError, UnsupportedError: as `foldconv.expand`.
        """
        build: Any = super().get_model  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(weights, nn.Module) and foldable_layers(weights):
            plain = build(cfg=cfg, weights=None, verbose=verbose)
            model: Any = expand_as_described(plain, describe_layers(weights), getattr(weights, "pt_path", "weights"))
            model.load(weights)
            return model
        plain = build(cfg=cfg, weights=weights, verbose=verbose)
        example = torch.zeros(2, plain.yaml.get("channels", 3), 64, 64)
        return expand(plain, self.method, example_inputs=example, inplace=True, **self.options)

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """ultralytics' optimizer; what decay must leave alone (scales, gates) is in the group of the norms."""
        optimizer: Any = super().build_optimizer(model, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        layers = [module for module in model.modules() if isinstance(module, Foldable)]
        exempt = {id(p) for m in layers for n, p in m.named_parameters(recurse=False) if n in m.no_decay}
        # MuSGD has two of each kind, the first for the heads.
        norms = [group for group in optimizer.param_groups if group.get("param_group") == "bn"][
            -1
        ]  # MuSGD's first: heads
        for group in optimizer.param_groups:
            if group["weight_decay"]:
                moved = [p for p in group["params"] if id(p) in exempt]
                group["params"] = [p for p in group["params"] if id(p) not in exempt]
                norms["params"] += moved
        return optimizer

    def final_eval(self) -> None:
        """ultralytics' last validation, then the folds."""
        super().final_eval()  # pyright: ignore[reportAttributeAccessIssue]
        trainer: Any = self
        for path in (trainer.last, trainer.best):
            if Path(path).exists():
                fold_checkpoint(path)


class FoldConvTrainer(FoldConv, DetectionTrainer):
    """Trains detectors; a subclass says by which ``method``."""


def fold_checkpoint(path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Fold a checkpoint of ultralytics' into one that ``YOLO(...)`` loads without foldconv.

    The file is read as ultralytics reads its files, which runs code of the file's: for files of one's own.

    Args:
        path: ``best.pt`` or ``last.pt``; of a training that is not finished, the average is folded.
        out: the file to write; by default `path` with `SUFFIX`. Its weights are of float32.

    Returns:
        The file that was written.

    Raises:
        CheckpointError: for a file without expanded layers.
        FoldMismatchError, UnsupportedError: as `foldconv.fold`.
    """
    model, content = load_checkpoint(path)
    if not foldable_layers(model):
        raise CheckpointError(f"{path}: expected an expanded network, found a plain {type(model).__name__}")
    folded = fold(model, inplace=True)
    out = Path(path).with_stem(Path(path).stem + SUFFIX) if out is None else Path(out)
    rest = dict.fromkeys(_OF_TRAINING, None)
    with atomic_path(out) as temporary:
        torch.save({**content, **rest, "epoch": -1, "model": folded}, temporary)
    return out
