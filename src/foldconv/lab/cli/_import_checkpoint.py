"""Read a published checkpoint of a method's original repository, and write the network as a file of foldconv.

No code in the checkpoint is run. The file that is written says which network it holds, so that eval, fold and inspect
need nothing else.
"""

from __future__ import annotations

import argparse
from typing import Any

from ._common import Parser, add_choice, add_pairs, check_out, pairs, parameters

HELP = "read a published checkpoint of an original repository"
EXAMPLES = (
    "foldconv import-checkpoint RepVGG-A0-train.pth a0.safetensors --source repvgg --architecture plain_repvgg_a0",
    "foldconv import-checkpoint wide.pth.tar wide.safetensors --source dbb --architecture orepa_resnet18 "
    "--architecture-args width=2 --json",
    "foldconv import-checkpoint ResNet-18_OREPA.pth.tar r18.safetensors --source orepa --architecture orepa_resnet18",
)


def add_arguments(parser: Parser) -> None:
    """Input, output, where it comes from, and which network it is."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file to read; no code in it is run")
    parser.add_argument("out", metavar="OUT", help="file to write; an existing one is never overwritten")
    parser.add_argument(
        "--source",
        metavar="NAME",
        required=True,
        help="repository it comes from, do-conv, orepa, dbb, repvgg, acnet or dgconv",
    )
    parser.add_argument(
        "--architecture", metavar="NAME", required=True, help="its plain network, with the original's module names"
    )
    add_pairs(parser, "--architecture-args", "options of the network")
    add_pairs(parser, "--method-args", "options of the method that the checkpoint does not tell")
    add_choice(parser)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Import and write; what was found as plain values and as a line."""
    check_out(options.out)

    from ...files.atomic import atomic_path
    from ...files.native import describe_layers, save
    from ...files.originals import import_checkpoint
    from .. import zoo

    arguments = pairs(options, "architecture_args")
    plain = zoo.create(options.architecture, **arguments)
    network = import_checkpoint(
        options.checkpoint,
        plain,
        options.source,
        weights=options.weights,
        prefix=options.prefix,
        **pairs(options, "method_args"),
    )
    layers = describe_layers(network)
    # A checkpoint that the original's code has folded has no norms where the plain network has some.
    folded = not layers and network.state_dict().keys() != plain.state_dict().keys()
    methods = sorted({layer["method"] for layer in layers.values()})
    extra = {
        "architecture": options.architecture,
        "architecture_args": arguments,
        "batchnorm_folded": folded,
        "input_shape": list(zoo.input_shape(plain)),
        "method": "+".join(methods) or "plain",
    }
    with atomic_path(options.out, overwrite=False) as temporary:
        save(network, temporary, extra=extra)
    result = {
        "out": options.out,
        "source": options.source,
        "architecture": options.architecture,
        "method": extra["method"],
        "layers": list(layers),
        "folded_by_the_original": folded,
        "parameters": parameters(network),
    }
    what = f"{len(layers)} {extra['method']} layers" if layers else "folded by the original" if folded else "plain"
    told = "".join(f"; {line}" for line in options.told)  # in the same line
    options.told.clear()
    return result, f"{options.out}: {options.architecture}, {what}, {result['parameters']:,} parameters{told}"
