"""Measure what the methods cost against the plain network: training step, evaluation, folding, memory, the loop.

All networks run in one process. Every round runs each of them once; a ratio is the median over the rounds of a
network's time divided by the plain network's in the same round. A second plain network shows the noise.
`foldconv bench plot FILE...` draws what such runs wrote.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from ..bench.config import CLOCKS, DEVICES, BenchConfig
from ._common import Parser, check_out

HELP = "measure what the methods cost"
EXAMPLES = (
    "foldconv bench resnet18 --batch 8,32 --size 224,64 --methods doconv,orepa,dbb --out overhead.json",
    "foldconv bench resnet18 --what eval,fold,memory",
    "foldconv bench cifar_resnet20 --batch 32 --size 32 --what step,kept,loop --clock cpu",
    "foldconv bench torchvision/resnet50 --batch 4 --methods doconv,orepa:large=orepa --path auto,torch",
)
_FIELDS = dataclasses.fields(BenchConfig)[1:]


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, received {text!r}") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def add_arguments(parser: Parser) -> None:
    """One option per field of `BenchConfig`, and where to write."""
    network = dataclasses.fields(BenchConfig)[0]
    help = f"{network.metadata['help']} (default: {network.default})"
    parser.add_argument("network", metavar="NETWORK", nargs="?", default=network.default, help=help)
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    for field in _FIELDS:
        option, default = "--" + field.name.replace("_", "-"), field.default
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"]}
        if default is False:
            parser.add_argument(option, action="store_true", **settings)
            continue
        if isinstance(default, tuple):
            settings["type"] = _numbers if isinstance(default[0], int) else _words
            settings["metavar"] = "N,..." if isinstance(default[0], int) else "NAME,..."
            settings["help"] += f" (default: {','.join(map(str, default))})"
        else:
            settings["type"] = type(default)
            settings["help"] += f" (default: {default})"
            choices = {"device": DEVICES, "clock": CLOCKS}.get(field.name)
            settings |= {"choices": choices} if choices else {"metavar": "N"}
        parser.add_argument(option, **settings)


def config_of(options: argparse.Namespace) -> BenchConfig:
    """What `add_arguments` let the user choose."""
    return BenchConfig(options.network, **{f.name: getattr(options, f.name) for f in _FIELDS if f.name in options})


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measure; as plain values and as a table."""
    config, out = config_of(options), options.out
    if out is not None:
        check_out(out, force=True)
    from ...files.atomic import write_json
    from ..bench.measure import measure
    from ..bench.report import table

    try:
        report = measure(config, progress, out)
    finally:
        progress("")
    text = table(report)
    if out is not None:
        write_json(out, report, indent=1)
        text += f"\n\n{out}: written"
    return report, text


def progress(text: str) -> None:
    """One line rewritten, between measurements: a display that refreshes itself would take time from them."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
