"""Fold a trained network, equalize it, and write it in int8; then run it beside the float file and compare.

The suffix of OUT is the format:

{formats}

Ranges are measured on training images; accuracy, error, size and latency are reported before and after, with the
layers that the runtime leaves in float. Nothing is left at OUT when anything fails.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...deploy.formats import described_int8, format_of
from ._calibration import add_calibration, calibration_data, training_images
from ._common import Parser, add_checkpoint, add_labels, add_network_arguments, check_out, count, labels_of, open_named

HELP = "write a network in int8 for ONNX Runtime, OpenVINO, ExecuTorch or LiteRT"
EXAMPLES = (
    "foldconv quantize runs/digits-digits_resnet-doconv digits.onnx",
    "foldconv quantize runs/mine mine.onnx --calibration photos/ --keep-float conv1 --auto-keep 2",
)


def add_arguments(parser: Parser) -> None:
    """The network, the file, the images, and what stays in float."""
    parser.description = (__doc__ or "").format(formats=described_int8())
    add_checkpoint(parser)
    parser.add_argument("out", metavar="OUT", help="file to write; its suffix is the format")
    add_network_arguments(parser)
    add_calibration(
        parser, "data set whose training images are used, or a folder of images (default: that of training)"
    )
    parser.add_argument(
        "--judge", metavar="N", type=count, default=1000, help="test images to judge by (default: 1000)"
    )
    parser.add_argument(
        "--keep-float",
        metavar="PATTERN",
        action="append",
        default=[],
        help="layers that stay in float, by a glob on their names; may be given several times",
    )
    parser.add_argument("--auto-keep", metavar="N", type=count, default=0, help="so many more: the most sensitive ones")
    parser.add_argument("--no-equalize", action="store_true", help="leave the ranges of channels as they are")
    parser.add_argument("--per-tensor", action="store_true", help="one scale for a weight, not one for each channel")
    parser.add_argument(
        "--fixed-batch", action="store_true", help="take one image at a time only (default: any number)"
    )
    add_labels(parser)
    parser.add_argument("--force", action="store_true", help="replace what is there")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Fold, equalize, quantize, run; the report as plain values and as a table."""
    import dataclasses

    from ...deploy.quantize import quantize

    form = format_of(options.out)
    form.expect_int8()
    check_out(options.out, force=options.force)
    network, description = open_named(options, options.checkpoint)
    images, judges = _images(options, description)
    found = quantize(
        network,
        options.out,
        images,
        evaluation=judges,
        keep_float=options.keep_float,
        auto_keep=options.auto_keep,
        equalize=not options.no_equalize,
        per_channel=not options.per_tensor,
        dynamic_batch=not options.fixed_batch,
        labels=labels_of(options, description),
        preprocessing=description.get("preprocessing"),
        overwrite=options.force,
    )
    return dataclasses.asdict(found) | {"path": str(found.path)}, str(found)


def _images(options: argparse.Namespace, description: dict[str, Any]) -> tuple[Any, Any]:
    """Images to calibrate with, and those with labels to judge by, or None where there are none."""
    from ...errors import UnsupportedError
    from ..data import evaluation_loader

    folder = Path(options.calibration or "")
    if options.calibration and folder.is_dir() and not (folder / "train").is_dir():
        return _of_folder(options, description), None
    data = calibration_data(options, options.checkpoint, description)
    expected = description.get("input_shape")
    if expected and list(expected) != list(data.input_shape):
        raise UnsupportedError(
            f"--calibration {data.name}: expected images of shape {tuple(expected)}, as in training, received "
            f"{tuple(data.input_shape)}"
        )
    judges: list[Any] = []
    left = options.judge
    for images, labels in evaluation_loader(data):
        judges.append((images[:left], labels[:left]))
        left -= len(judges[-1][1])
        if not left:
            break
    return training_images(data, options.images), judges


def _of_folder(options: argparse.Namespace, description: dict[str, Any]) -> list[Any]:
    """Images of a folder as in training, evenly taken."""
    from ...errors import CheckpointError, UnsupportedError
    from ..data.folders import image_files, read_rgb
    from ..data.preprocessing import expect_described, prepare

    files = image_files(options.calibration)
    if not files:
        raise UnsupportedError(f"{options.calibration}: expected images in this folder, found none")
    if description.get("preprocessing") is None:
        raise CheckpointError(
            f"{options.checkpoint}: does not say how images are prepared; train it anew, or give data"
        )
    steps = expect_described(description["preprocessing"], options.checkpoint)
    taken = files[:: max(1, len(files) // options.images)][: options.images]
    return [prepare(read_rgb(file), steps) for file in taken]
