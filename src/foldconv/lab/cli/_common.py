"""What all commands share: a parser with one-line errors, common options, values given as KEY=VALUE."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from ...errors import unknown


class UsageError(Exception):
    """The command line itself is wrong; `program` is the command it was meant for."""

    def __init__(self, program: str, message: str):
        super().__init__(message)
        self.program = program


class Parser(argparse.ArgumentParser):
    """argparse with errors raised in one line, and the nearest choice in them."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, which --help shows."""
        raise UsageError(self.prog, " ".join(message.split()))

    def options(self) -> list[str]:
        """All option names, such as ``--epochs``."""
        return [name for action in self._actions for name in action.option_strings]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown("value", value, action.choices))


COMMON = Parser(add_help=False)
COMMON.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
COMMON.add_argument("--debug", action="store_true", help="show the traceback of an error")


def parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """The options, or a `UsageError` that names the nearest option."""
    options, others = parser.parse_known_args(arguments)
    if others:
        command: Parser = options.parser
        name = next((word for word in others if word.startswith("-")), others[0]).partition("=")[0]
        command.error(unknown("argument", name, command.options()))
    return options


def key_value(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` with the value read as YAML.

    >>> key_value("width=32"), key_value("scales=[1, 2]")
    (('width', 32), ('scales', [1, 2]))
    """
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, received {text!r}")
    import yaml

    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"expected a value in YAML after {key}=, received {value!r}") from None


def add_network_arguments(parser: Parser) -> None:
    """Options for files that do not say which network they are for."""
    parser.add_argument("--architecture", metavar="NAME", help="network, for a file that does not say which it holds")
    add_pairs(parser, "--architecture-args", "options of the network")


def add_pairs(parser: Parser, option: str, help: str) -> None:
    """An option that takes any number of KEY=VALUE; absent from the result when not given."""
    parser.add_argument(
        option,
        nargs="+",
        action="extend",
        type=key_value,
        metavar="KEY=VALUE",
        default=argparse.SUPPRESS,
        help=help,
    )


def pairs(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """What `add_pairs` collected, as a dictionary."""
    return dict(getattr(options, name, []))
