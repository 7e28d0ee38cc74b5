"""List the methods: what each adds, when to take it, what a training step costs, and what it was seen to gain.

Steps are CPU time relative to the plain network's step; gains measured here are points of accuracy, paired by seed,
with 95 % intervals. `docs/methods` has a page for each method, with its equation and its picture.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from ._common import Parser

HELP = "list the methods, with what they cost and what they gain"
EXAMPLES = ("foldconv methods", "foldconv methods orepa repvgg", "foldconv methods --json")
_SAID = Path(__file__).parents[1] / "methods.json"
"""Written by docs/write_method_pages.py, from advice, measurements and reports."""


def add_arguments(parser: Parser) -> None:
    """Which methods."""
    parser.add_argument("names", metavar="NAME", nargs="*", help="methods to tell of (default: all)")


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """What is known of the methods; as plain values and as text."""
    from ...methods import get_method, list_methods

    said = json.loads(_SAID.read_text(encoding="utf-8"))
    nothing: dict[str, Any] = {"when": "", "steps": {}, "evidence": []}  # a method that somebody else registered
    values = []
    for name in options.names or list_methods():
        about = get_method(name)
        own = {each: getattr(about, each) for each in ("title", "adds", "kind", "paper")}
        values.append({"name": name, **own, "reported_gain": about.gain, **said.get(name, nothing)})
    return values, "\n\n".join(map(_text, values))


def _text(method: dict[str, Any]) -> str:
    found = [
        f"{each['difference']} ({each['interval']}{'' if each['shown'] == 'yes' else ': not shown'}), "
        f"{each['data']}, {each['seeds']} seeds"
        for each in method["evidence"]
    ]
    steps = [f"{ratio:.2f} {case}" for case, ratio in method["steps"].items()]
    lines = {
        "adds": f"{method['adds']} ({method['kind']})",
        "when": method["when"],
        "step": "; ".join(steps) or "not measured",
        "gain": "; ".join(found) or "not measured here",
        "reported": f"{method['reported_gain']}; {method['paper']}",
    }
    head = f"{method['name']}: {method['title']}" if method["title"] != method["name"] else method["name"]
    return "\n".join([head, *(_line(what, text) for what, text in lines.items() if text)])


def _line(what: str, text: str) -> str:
    return textwrap.fill(text, 100, initial_indent=f"  {what:10}", subsequent_indent=" " * 12, break_on_hyphens=False)
