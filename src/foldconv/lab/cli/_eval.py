"""Measure the test accuracy of a checkpoint: last.ckpt of a run, a file of foldconv.save, or folded weights.

The data are those of training, in a run folder from where training took them; the images have their size in training,
also those of other data. Options below override that.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..run import RunFolder
from ..train.config import TrainConfig, read_yaml
from ._common import Parser, add_checkpoint, add_network_arguments, evaluating, open_named, parameters

HELP = "test accuracy of a checkpoint"
EXAMPLES = (
    "foldconv eval runs/digits-digits_resnet-doconv",
    "foldconv eval runs/digits-digits_resnet-doconv/folded.safetensors --json",
    "foldconv eval weights.pth --architecture digits_resnet --architecture-args width=32 --data digits",
)


def add_arguments(parser: Parser) -> None:
    """The checkpoint, and what it may not say itself."""
    add_checkpoint(parser)
    add_network_arguments(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="NAME", help="data set (default: the one it was trained on)")
    group.add_argument("--data-folder", metavar="FOLDER", help="where data sets lie (default: the run's, or data)")
    group.add_argument("--no-download", action="store_true", help="never download a data set that is not there")
    group.add_argument(
        "--image-size",
        metavar="N",
        type=int,
        help="height and width the images are resized to (default: as in training)",
    )
    group.add_argument(
        "--holdout",
        metavar="N",
        type=int,
        nargs="?",
        const=True,
        help="test on the last training images, as many as the test split has or so many (default: as in training)",
    )
    group.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="normalize pixels to mean 0 and deviation 1; no: they stay in [0, 1] (default: as in training)",
    )
    group.add_argument(
        "--corrupt-images",
        choices=("error", "skip"),
        help="images that cannot be read: stop, or count them (default: the run's, or error)",
    )
    group.add_argument("--workers", metavar="N", type=int, default=0, help="processes that decode images (default: 0)")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="cpu, cuda, mps (default: cpu)")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Evaluate; the result as plain values and as text."""
    from ...errors import CheckpointError
    from ...network.tree import foldable_layers
    from ..importing import names_code
    from ..train.checkpoint import check_classes
    from ..train.classification import task_of

    _check_device(options.device)
    network, description = open_named(options, options.checkpoint)
    name = options.data or description.get("data")
    if name is None:
        raise CheckpointError(f"{options.checkpoint}: does not say what it was trained on; name it with --data")
    task = task_of(description.get("task", "classification"))
    opened = {"workers": options.workers, "task": task.name, **data_options(options, description)}
    config = TrainConfig(data=name, **opened) if isinstance(name, str) else None
    if config is None or (options.data is None and names_code(config.data)):
        # A file is not trusted: a module that it names would be run.
        raise CheckpointError(
            f"{options.checkpoint}: names {name!r} as its data, whose code would run; if you trust it, give --data"
        )
    task.check(config)
    data = task.open_data(config)
    check_classes({"foldconv": description}, data, options.checkpoint)
    with evaluating(options.checkpoint, data.input_shape):
        found = task.evaluate(network, data, device=options.device, workers=config.workers)
    layers = len(foldable_layers(network))
    result = {
        "checkpoint": options.checkpoint,
        "architecture": description["architecture"],
        "data": name,
        "task": task.name,
        "foldable_layers": layers,
        "parameters": parameters(network),
        **found,
        "input_shape": list(data.input_shape),
        "images_skipped": int(getattr(data, "images_skipped", 0)),
    }
    skipped = f", {result['images_skipped']} skipped" if result["images_skipped"] else ""
    height, width = data.input_shape[1:]
    state = f"{layers} layers expanded" if layers else "plain"
    top5 = f"  top-5 {100 * found['top5_accuracy']:.2f} %" if "top5_accuracy" in found else ""
    loss = f"  loss {found['loss']:.4f}" if "loss" in found else ""
    return result, (
        f"test {task.label} {100 * found[task.measure]:.2f} %{top5}{loss}  "
        f"({found['images']} images of {name}, {height}x{width}{skipped}; {description['architecture']}, {state}, "
        f"{result['parameters']:,} parameters)"
    )


def _check_device(name: str) -> None:
    """Refuse a device that torch does not know or cannot use here, before anything is read."""
    import torch

    from ...errors import UnsupportedError

    try:
        torch.zeros((), device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available())]
        raise UnsupportedError(
            f"--device {name}: expected one that can be used here ({', '.join(there)}), received: "
            f"{str(error).partition('. ')[0]}"
        ) from None


def data_options(options: argparse.Namespace, description: dict[str, Any]) -> dict[str, Any]:
    """How the data set is opened: as the options say, then as in training, as far as the checkpoint tells."""
    from ..importing import names_code
    from ..train.checkpoint import checkpoint_file

    # Which images were trained on depends on it, wherever the folder is now.
    found = {"split": description["split"]} if "split" in description else {}
    if description.get("task", "classification") != "classification":
        found["image_size"] = description.get("image_size")
    elif not names_code(options.data or ""):  # which sizes its images itself
        found["image_size"] = _training_size(description)
    if options.data is None:
        config = RunFolder(checkpoint_file(options.checkpoint).parent).config
        values = read_yaml(config) if config.is_file() else {}
        if values.get("data") == description.get("data"):  # else it is not this checkpoint's
            found |= {key: values[key] for key in ("data_folder", "download", "corrupt_images") if key in values}
        found |= {key: description[key] for key in ("holdout", "normalize") if key in description}
    given = {"data_folder": options.data_folder, "image_size": options.image_size}
    given |= {"corrupt_images": options.corrupt_images, "download": False if options.no_download else None}
    given |= {"holdout": options.holdout, "normalize": options.normalize}
    return found | {key: value for key, value in given.items() if value is not None}


def _training_size(description: dict[str, Any]) -> int | None:
    """Height and width of the images in training; None where a file does not say, and where they were no squares:
    images are resized to squares only, so these were not resized. Without data there was no training that we know:
    an imported file's shape is its architecture's.
    """
    shape = description.get("input_shape") if description.get("data") else None
    if not isinstance(shape, list) or len(shape) != 3 or shape[1] != shape[2]:
        return None
    return shape[1] if isinstance(shape[1], int) else None
