"""Measure the test accuracy of a checkpoint: last.ckpt of a run, a file of foldconv.save, or folded weights."""

from __future__ import annotations

import argparse
from typing import Any

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
    parser.add_argument("--data", metavar="NAME", help="data set (default: the one it was trained on)")
    add_network_arguments(parser)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Evaluate; the result as plain values and as text."""
    from ..errors import CheckpointError
    from ..surgery import foldable_layers
    from ..train.checkpoint import open_network
    from ..train.data import create_data
    from ..train.evaluation import evaluate

    network, description = open_network(options.checkpoint, options.architecture, pairs(options, "architecture_args"))
    name = options.data or description.get("data")
    if name is None:
        raise CheckpointError(f"{options.checkpoint}: does not say what it was trained on; name it with --data")
    found = evaluate(network, create_data(name))
    layers = len(foldable_layers(network))
    result = {
        "checkpoint": options.checkpoint,
        "architecture": description["architecture"],
        "data": name,
        "foldable_layers": layers,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **found,
    }
    state = f"{layers} layers expanded" if layers else "plain"
    return result, (
        f"test accuracy {100 * found['accuracy']:.2f} %  loss {found['loss']:.4f}  "
        f"({found['images']} images of {name}; {description['architecture']}, {state}, "
        f"{result['parameters']:,} parameters)"
    )
