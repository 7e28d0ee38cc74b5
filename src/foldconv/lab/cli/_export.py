"""Fold a trained network and write it in the format of a runtime, which then runs the file beside the network.

The suffix of OUT is the format:

{formats}

Nothing is left at OUT unless the runtime computes what the folded network does.
"""

from __future__ import annotations

import argparse
from typing import Any

from ...deploy.formats import described_formats, format_of
from ._common import Parser, add_checkpoint, add_labels, add_network_arguments, count, labels_of, open_named

HELP = "write a network for ONNX Runtime, OpenVINO, ExecuTorch, Core ML, ncnn, LiteRT or torch"
EXAMPLES = (
    "foldconv export runs/digits-digits_resnet-doconv digits.onnx",
    "foldconv export last.ckpt digits.xml --fixed-batch 1 --json",
)


def add_arguments(parser: Parser) -> None:
    """The network, the file, and what to say in it."""
    parser.description = (__doc__ or "").format(formats=described_formats())
    add_checkpoint(parser)
    parser.add_argument("out", metavar="OUT", help="file to write; its suffix is the format")
    add_network_arguments(parser)
    parser.add_argument("--fixed-batch", metavar="N", type=count, help="take batches of N images only (default: any)")
    add_labels(parser)
    parser.add_argument("--no-check", action="store_true", help="write only; do not run what was written")
    parser.add_argument("--force", action="store_true", help="replace what is there")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Fold, write, run; what was written as plain values and in a line."""
    import dataclasses

    from ...deploy.export import export
    from ..train.classification import task_of
    from ..zoo import example_images, input_shape
    from ._common import check_out

    form = format_of(options.out)
    check_out(options.out, force=options.force)
    network, description = open_named(options, options.checkpoint)
    task_of(description.get("task", "classification")).check_export(options.checkpoint)
    shape = tuple(description.get("input_shape") or input_shape(network))
    exported = export(
        network,
        options.out,
        example_images(network, shape, count=options.fixed_batch or (2 if form.any_batch else 1)),
        dynamic_batch=options.fixed_batch is None,
        labels=labels_of(options, description),
        preprocessing=description.get("preprocessing"),
        check=not options.no_check,
        overwrite=options.force,
    )
    result = dataclasses.asdict(exported) | {"path": str(exported.path), "input_shape": list(shape)}
    return result, str(exported)
