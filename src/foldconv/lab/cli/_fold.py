"""Fold a checkpoint into the plain network, verify it layer by layer, and write its weights as safetensors.

A .safetensors says itself which network it is for; .pt and .pth hold the weights alone, as torch.save writes them. The
verification is written beside it: deploy.safetensors gets deploy.report.json.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from ._common import Parser, add_checkpoint, add_network_arguments, check_out, evaluating, open_named, parameters

HELP = "write the plain network of a checkpoint"
EXAMPLES = (
    "foldconv fold runs/digits-digits_resnet-doconv deploy.safetensors",
    "foldconv fold runs/digits-digits_resnet-doconv/last.ckpt deploy.safetensors --batchnorm --json",
)
_SUFFIXES = (".safetensors", ".pt", ".pth")
_TOLERANCE = 1e-3  # relative, of the whole network in float32; each layer was already checked more strictly


def add_arguments(parser: Parser) -> None:
    """Input, output, and what else to fold."""
    add_checkpoint(parser)
    parser.add_argument("out", metavar="OUT", help="file to write, .safetensors, .pt or .pth; an existing one stays")
    parser.add_argument("--batchnorm", action="store_true", help="also absorb the norms that follow convolutions")
    add_network_arguments(parser)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Fold, verify, write; the report as plain values and as a table."""
    suffix = Path(options.out).suffix
    if suffix not in _SUFFIXES:
        raise UnsupportedError(
            f"{options.out}: expected a name that ends in {', '.join(_SUFFIXES)}, received {suffix or 'none'}; choose "
            "such a name, or let `foldconv export` write a runtime's format"
        )
    report_path = Path(options.out).with_suffix(".report.json")
    check_out(options.out, report_path)

    import torch

    from ...errors import FoldMismatchError
    from ...files.atomic import atomic_path, write_json
    from ...files.native import save
    from ...network.fold import fold
    from ..train.classification import task_of
    from ..zoo import example_images, input_shape

    network, description = open_named(options, options.checkpoint)
    shape = tuple(description.get("input_shape") or input_shape(network))
    images = example_images(network, shape, count=4)
    task = task_of(description.get("task", "classification"))
    # Without its norms it is no longer the architecture, so its blocks may go, too.
    chosen: dict[str, Any] = {"batchnorm": options.batchnorm, "blocks": None if options.batchnorm else False}
    chosen["example_inputs"] = task.inputs(images)
    folded = fold(network, **chosen)
    with evaluating(options.checkpoint, shape):
        report = task.verify(network, folded, images, **chosen)
    if not report.ok(_TOLERANCE):
        raise FoldMismatchError(
            f"{options.checkpoint}: the folded network differs by {report.max_error:.1e} (outputs up to "
            f"{report.scale:.1e}); nothing was written"
        )
    extra = {key: value for key, value in description.items() if key != "layers"}
    extra["batchnorm_folded"] = options.batchnorm or bool(description.get("batchnorm_folded"))
    with atomic_path(options.out, overwrite=False) as temporary:
        if suffix == ".safetensors":
            save(folded, temporary, extra=extra)
        else:
            torch.save(folded.state_dict(), temporary)
    result = {
        "out": options.out,
        "report": str(report_path),
        "source": options.checkpoint,
        "architecture": description["architecture"],
        "architecture_args": description.get("architecture_args", {}),
        "batchnorm_folded": extra["batchnorm_folded"],
        "input_shape": list(shape),
        "tolerance": _TOLERANCE,
        "max_error": report.max_error,
        "layers": [dataclasses.asdict(layer) for layer in report.layers],
        "parameters_before": parameters(network),
        "parameters_after": parameters(folded),
    }
    write_json(report_path, result, overwrite=False)
    return result, (
        f"{report}\n\n{options.out}: {result['parameters_after']:,} parameters (before: "
        f"{result['parameters_before']:,})\nthe verification: {report_path}"
    )
