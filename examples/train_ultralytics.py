"""ultralytics: a YOLO that stays expanded through training, resuming, validation and export, and its fold.

    pip install foldconv ultralytics
    python examples/train_ultralytics.py FOLDER

The data are made here: squares, bright and dark, in YOLO's format.
"""

import contextlib
import os
import sys
from pathlib import Path

os.environ["YOLO_OFFLINE"] = "true"  # no look for updates, fonts or weights
import numpy as np
import torch
from PIL import Image
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint

import foldconv.ultralytics


class Trainer(foldconv.ultralytics.FoldConvTrainer):
    """ultralytics' trainer of detectors; with several GPUs each process imports it from here."""

    method = "doconv"


class Stop(Exception):
    """A training that ends too early."""


def squares(folder, count=12, size=64):
    """A data set in YOLO's format: one square on each grey image; a label is class, centre, width and height."""
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = random.integers(100, 130, (size, size, 3)).astype(np.uint8)
            width, label = int(random.integers(16, 32)), number % 2
            left, top = random.integers(0, size - width, 2)
            pixels[top : top + width, left : left + width] = 220 if label else 20
            Image.fromarray(pixels).save(folder / f"images/{part}/{number}.png")
            box = [(left + width / 2) / size, (top + width / 2) / size, width / size, width / size]
            (folder / f"labels/{part}/{number}.txt").write_text(f"{label} " + " ".join(map(str, box)))
    path = folder / "squares.yaml"
    path.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames: [dark, bright]\n")
    return path


def stop_after_the_first(trainer):
    if trainer.epoch == 0:
        raise Stop


def main(folder, trainer=Trainer):
    """Train, be stopped after an epoch, resume, validate and export, and load the fold."""
    folder = Path(folder)
    options = {"data": squares(folder / "data"), "imgsz": 64, "batch": 4, "epochs": 2, "optimizer": "SGD", "lr0": 0.01}
    options |= {"project": str(folder.resolve()), "name": "run", "exist_ok": True, "device": "cpu", "workers": 0}
    options |= {"plots": False, "amp": False, "trainer": trainer, "pretrained": False}
    yolo = YOLO("yolo11n.yaml")
    yolo.add_callback("on_model_save", stop_after_the_first)
    with contextlib.suppress(Stop):
        yolo.train(**options)
    weights = folder / "run/weights"
    resumed = YOLO(weights / "last.pt")
    resumed.train(resume=True, trainer=trainer)

    expanded, _ = load_checkpoint(weights / "best.pt")
    folded, _ = load_checkpoint(weights / "best.folded.pt")
    with torch.no_grad():
        images = torch.rand(2, 3, 64, 64).double()
        before, after = expanded.double().eval()(images)[0], folded.double().eval()(images)[0]
    quiet = {
        "data": options["data"],
        "imgsz": 64,
        "device": "cpu",
        "workers": 0,
        "plots": False,
        "project": str(folder),
    }
    return {
        "mAP50": [YOLO(weights / name).val(**quiet).box.map50 for name in ("best.pt", "best.folded.pt")],
        "exported": YOLO(weights / "best.pt").export(format="torchscript", imgsz=64, device="cpu"),
        "layers": sum(type(module).__name__ == "DOConv2d" for module in expanded.modules()),
        "error": ((before - after).abs().max() / before.abs().max()).item(),
    }


if __name__ == "__main__":
    print(main(sys.argv[1]))
