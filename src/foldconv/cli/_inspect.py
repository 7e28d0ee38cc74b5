"""Show a network layer by layer: parameters and multiply-adds, while training and after folding."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from ._common import Parser, add_network_arguments, add_pairs, pairs

HELP = "layers and costs of a checkpoint or an architecture"
EXAMPLES = (
    "foldconv inspect runs/digits-digits_resnet-doconv/last.ckpt",
    "foldconv inspect resnet18 --method doconv",
    "foldconv inspect digits_resnet --architecture-args width=32 --json",
)
_FILES = {".ckpt", ".pt", ".pth", ".tar", ".safetensors"}


def add_arguments(parser: Parser) -> None:
    """What to show, and how to expand it first."""
    parser.add_argument(
        "subject", metavar="CHECKPOINT|ARCHITECTURE", help="a file, or a name of the zoo, timm, torchvision"
    )
    parser.add_argument("--method", metavar="NAME", help="expand the network with this method first")
    add_pairs(parser, "--method-args", "options of the method")
    parser.add_argument(
        "--input-shape",
        nargs="+",
        type=int,
        metavar="N",
        help="channels and size of one image (default: the network's)",
    )
    add_network_arguments(parser)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Summarize; as plain values and as a table."""
    from .. import zoo
    from ..errors import CheckpointError
    from ..inspection import summary
    from ..methods import method_from_json
    from ..surgery import expand

    subject, arguments = options.subject, pairs(options, "architecture_args")
    if os.path.exists(subject):
        from ..train.checkpoint import open_network

        network, description = open_network(subject, options.architecture, arguments)
    elif Path(subject).suffix in _FILES:
        raise CheckpointError(f"{subject}: no such file")
    else:
        network, description = zoo.create(subject, **arguments).eval(), {"architecture": subject}
    if options.method:
        network = expand(network, method_from_json({"method": options.method, **pairs(options, "method_args")}))
    shape = options.input_shape or description.get("input_shape") or zoo.input_shape(network)
    found = summary(network, (1, *shape))
    return {"architecture": description["architecture"], **dataclasses.asdict(found)}, str(found)
