"""Show a network layer by layer: parameters and multiply-adds, while training and after folding; or its branches; or
what int8 will meet, ranges of weights and activations.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from ..run import RunFolder
from ._calibration import add_calibration, calibration_images
from ._common import Parser, UsageError, add_network_arguments, check_picture, evaluating, open_named, pairs

HELP = "layers and costs of a checkpoint or an architecture"
EXAMPLES = (
    "foldconv inspect runs/digits-digits_resnet-doconv",
    "foldconv inspect resnet18 --method doconv",
    "foldconv inspect digits_resnet --architecture-args width=32 --json",
    "foldconv inspect runs/digits-digits_resnet-doconv --branches --plot branches.png",
    "foldconv inspect runs/digits-digits_resnet-doconv --ranges --plot ranges.png",
)
_FILES = {".ckpt", ".pt", ".pth", ".tar", ".safetensors"}


def add_arguments(parser: Parser) -> None:
    """What to show, and how to expand it first."""
    parser.add_argument(
        "subject",
        metavar="CHECKPOINT|ARCHITECTURE",
        help="a file or run folder, or a name of the zoo, timm, torchvision",
    )
    parser.add_argument(
        "--input-shape",
        nargs="+",
        type=int,
        metavar="N",
        help="channels and size of one image (default: the network's)",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--branches",
        action="store_true",
        help="show each branch's share of the folded kernel instead, how similar the branches are, and what else the "
        "method learned",
    )
    shown.add_argument(
        "--ranges",
        action="store_true",
        help="show the ranges of the folded network's weights and activations instead, and what will hurt int8",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="with --branches or --ranges: PNG to draw it into; branches of a run folder with their course",
    )
    add_network_arguments(parser, method="expand the network with this method first, where its file does not")
    add_calibration(parser)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Summarize, or take apart; as plain values and as a table."""
    if pairs(options, "method_args") and not options.method:
        raise UsageError("foldconv inspect", "--method-args are options of a method: name it with --method")
    if options.branches:
        return _branches(options)
    if options.ranges:
        return _ranges(options)
    if options.plot:
        raise UsageError("foldconv inspect", "--plot draws branches or ranges: add --branches or --ranges")
    from ...network.costs import summary
    from .. import zoo

    network, description = _network(options, options.subject)
    shape = options.input_shape or description.get("input_shape") or zoo.input_shape(network)
    with evaluating(options.subject, shape):
        found = summary(network, (1, *shape))
    return {"architecture": description["architecture"], **dataclasses.asdict(found)}, str(found)


def _branches(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ...network.branches import branches

    if options.input_shape:
        raise UsageError("foldconv inspect", "--branches looks at no image: leave --input-shape out")
    if options.plot:
        check_picture(options.plot)
    history: list[dict[str, Any]] = []
    if (file := RunFolder(options.subject).branches).is_file():
        from ..train.branch_table import read_branches

        history = read_branches(file)
    network, description = _network(options, options.subject)
    report = branches(network)
    values, text = {"architecture": description["architecture"], **report.to_json(), "history": history}, str(report)
    if options.plot:
        from ..train.branch_plot import plot_branches

        panels = plot_branches(report, options.plot, str(options.subject), history)
        values |= {"plot": options.plot, "panels": panels}
        text += f"\n\n{options.plot}: {', '.join(panels)}"
    return values, text


def _ranges(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ...deploy.ranges import range_report

    if options.input_shape:
        raise UsageError("foldconv inspect", "--ranges looks at images of a data set: leave --input-shape out")
    if options.plot:
        check_picture(options.plot)
    network, description = _network(options, options.subject)
    report = range_report(network, calibration_images(options, options.subject, description))
    values, text = {"architecture": description["architecture"], **report.to_json()}, str(report)
    if options.plot:
        from ..train.range_plot import plot_ranges

        plot_ranges(report, options.plot, str(options.subject))
        values["plot"] = options.plot
        text += f"\n\n{options.plot}"
    return values, text


def _network(options: argparse.Namespace, subject: str) -> tuple[Any, dict[str, Any]]:
    """The network that a file holds or a name stands for, expanded if asked to, and its description."""
    from ...errors import CheckpointError
    from ...methods import method_from_json
    from ...network.expand import expand
    from .. import zoo

    if os.path.exists(subject):
        try:
            network, description = open_named(options, subject, expanded=False)
        except CheckpointError:
            if not options.method or not options.architecture:
                raise
            return open_named(options, subject)  # the state_dict of an expanded network
    elif Path(subject).suffix in _FILES:
        raise CheckpointError(f"{subject}: no such file")
    else:
        network = zoo.create(subject, **pairs(options, "architecture_args")).eval()
        description: dict[str, Any] = {"architecture": subject}
    if options.method:
        method = method_from_json({"method": options.method, **pairs(options, "method_args")})
        images = zoo.example_images(network, options.input_shape or description.get("input_shape"))
        network = expand(network, method, example_inputs=images)
    return network, description
