"""Write the report of a comparison again from the runs that are finished; nothing is trained."""

from __future__ import annotations

import argparse
from typing import Any

from ._common import Parser
from ._compare import as_text

HELP = "write a comparison's report again"
EXAMPLES = ("foldconv compare report comparison",)


def add_arguments(parser: Parser) -> None:
    """Whose report."""
    parser.add_argument("folder", metavar="FOLDER", help="what --out of compare was")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Report; as plain values and as tables."""
    from ..compare.reporting import report

    values = report(options.folder)
    return values, as_text(values, options.folder)
