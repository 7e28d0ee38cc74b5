"""Measure what the methods cost against the plain network: training step, evaluation, folding, memory.

All networks run in one process. Every round runs each of them once; a ratio is the median over the rounds of a
network's time divided by the plain network's in the same round. A second plain network shows the noise.
`foldconv bench plot FILE...` draws what such runs wrote.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from ..bench.config import DEVICES, BenchConfig
from ._common import Parser, UsageError

HELP = "measure what the methods cost, or draw it"
EXAMPLES = (
    "foldconv bench resnet18 --batch 8,32 --size 224,64 --methods doconv,orepa,dbb --out overhead.json",
    "foldconv bench resnet18 --what eval,fold,memory",
    "foldconv bench torchvision/resnet50 --batch 4 --methods doconv,orepa:large=orepa --reference clones",
    "foldconv bench plot overhead.json --out overhead.png",
)
_PICTURE = "overhead.png"
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
    parser.add_argument("subject", metavar="NETWORK|plot", help="a name of the zoo, timm, torchvision; or plot")
    parser.add_argument("files", metavar="FILE", nargs="*", help="with plot: files that --out wrote")
    parser.add_argument("--out", metavar="FILE", help=f"JSON file to write; with plot the PNG (default: {_PICTURE})")
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
        elif default is not None:
            settings["type"] = type(default)
            settings["help"] += f" (default: {default})"
            settings |= {"choices": DEVICES} if field.name == "device" else {"metavar": "N"}
        else:
            settings["metavar"] = "FOLDER"
        parser.add_argument(option, **settings)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measure or draw; as plain values and as a table."""
    given = {field.name: getattr(options, field.name) for field in _FIELDS if field.name in options}
    if options.subject == "plot":
        if given:
            option = "--" + next(iter(given)).replace("_", "-")
            raise UsageError("foldconv bench plot", f"takes files and --out, not {option}")
        if not options.files:
            raise UsageError("foldconv bench plot", "the following arguments are required: FILE")
        return _plot(options.files, options.out or _PICTURE)
    if options.files:
        raise UsageError("foldconv bench", f"unknown argument {options.files[0]!r}; only plot takes files")
    return _measure(BenchConfig(options.subject, **given), options.out)


def _measure(config: BenchConfig, out: str | None) -> tuple[dict[str, Any], str]:
    if out is not None and not Path(out).parent.is_dir():  # before the work; the writing itself checks again
        raise FileNotFoundError(f"{out}: no folder {Path(out).parent} to write into; create it")
    import json

    from ...files.atomic import atomic_path
    from ..bench.measure import measure
    from ..bench.report import table

    try:
        report = measure(config, _progress, out)
    finally:
        _progress("")
    text = table(report)
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        text += f"\n\n{out}: written"
    return report, text


def _progress(text: str) -> None:
    """One line rewritten, between measurements: a display that refreshes itself would take time from them."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _plot(files: list[str], out: str) -> tuple[dict[str, Any], str]:
    from ..bench.plot import plot

    lines = plot(files, out)
    return {"out": out, "lines": lines}, f"{out}: {', '.join(lines)}"
