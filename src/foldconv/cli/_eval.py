"""Measure the test accuracy of a checkpoint: last.ckpt of a run, a file of foldconv.save, or folded weights."""

from __future__ import annotations

import argparse
from typing import Any

from ..train.config import TrainConfig
from ._common import Parser, add_network_arguments, pairs

HELP = "test accuracy of a checkpoint"
EXAMPLES = (
    "foldconv eval runs/digits-digits_resnet-doconv/last.ckpt",
    "foldconv eval runs/digits-digits_resnet-doconv/folded.safetensors --json",
    "foldconv eval weights.pth --architecture digits_resnet --architecture-args width=32 --data digits",
)


def add_arguments(parser: Parser) -> None:
    """The checkpoint, and what it may not say itself."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file to read; no code in it is run")
    add_network_arguments(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="NAME", help="data set (default: the one it was trained on)")
    group.add_argument("--data-folder", metavar="FOLDER", default="data", help="where data sets lie (default: data)")
    group.add_argument("--no-download", action="store_true", help="never download a data set that is not there")
    group.add_argument("--image-size", metavar="N", type=int, help="height and width the images are resized to")
    group.add_argument(
        "--corrupt-images",
        choices=("error", "skip"),
        default="error",
        help="images that cannot be read: stop, or count them (default: error)",
    )
    group.add_argument("--workers", metavar="N", type=int, default=0, help="processes that decode images (default: 0)")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="cpu, cuda, mps (default: cpu)")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Evaluate; the result as plain values and as text."""
    from ..errors import CheckpointError
    from ..surgery import foldable_layers
    from ..train.checkpoint import check_classes, open_network
    from ..train.data import is_data_module, open_data
    from ..train.evaluation import evaluate

    network, description = open_network(options.checkpoint, options.architecture, pairs(options, "architecture_args"))
    name = options.data or description.get("data")
    if name is None:
        raise CheckpointError(f"{options.checkpoint}: does not say what it was trained on; name it with --data")
    if options.data is None and (not isinstance(name, str) or is_data_module(name)):
        # A file is not trusted: a module that it names would be run.
        raise CheckpointError(
            f"{options.checkpoint}: names {name!r} as its data, whose code would run; if you trust it, give --data"
        )
    config = TrainConfig(
        data=name,
        data_folder=options.data_folder,
        download=not options.no_download,
        image_size=options.image_size,
        corrupt_images=options.corrupt_images,
        workers=options.workers,
    )
    data = open_data(config)
    check_classes({"foldconv": description}, data, options.checkpoint)
    found = evaluate(network, data, device=options.device, workers=config.workers)
    layers = len(foldable_layers(network))
    result = {
        "checkpoint": options.checkpoint,
        "architecture": description["architecture"],
        "data": name,
        "foldable_layers": layers,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **found,
        "images_skipped": int(getattr(data, "images_skipped", 0)),
    }
    skipped = f", {result['images_skipped']} skipped" if result["images_skipped"] else ""
    state = f"{layers} layers expanded" if layers else "plain"
    return result, (
        f"test accuracy {100 * found['accuracy']:.2f} %  loss {found['loss']:.4f}  "
        f"({found['images']} images of {name}{skipped}; {description['architecture']}, {state}, "
        f"{result['parameters']:,} parameters)"
    )
