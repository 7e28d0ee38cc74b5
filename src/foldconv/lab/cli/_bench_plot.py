"""Draw the ratio of training steps against the work per step, from what `foldconv bench --out` wrote."""

from __future__ import annotations

import argparse
from typing import Any

from ._common import Parser

HELP = "draw what bench measured"
EXAMPLES = ("foldconv bench plot overhead.json --out overhead.png",)


def add_arguments(parser: Parser) -> None:
    """What to draw, and where."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="files that bench --out wrote")
    parser.add_argument("--out", metavar="FILE", default="overhead.png", help="the PNG (default: %(default)s)")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Draw; the lines as plain values and by name."""
    from ..bench.plot import plot

    lines = plot(options.files, options.out)
    return {"out": options.out, "lines": lines}, f"{options.out}: {', '.join(lines)}"
