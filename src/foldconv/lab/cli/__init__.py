"""The command line, ``foldconv COMMAND``: one file per command; the names of some have two words.

Nothing heavy is imported before a command runs, so that help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from ... import __version__
from ...errors import install, unknown
from . import (
    _bench,
    _bench_plot,
    _compare,
    _compare_report,
    _completion,
    _convert_weights,
    _eval,
    _export,
    _fold,
    _import_checkpoint,
    _inspect,
    _methods,
    _predict,
    _quantize,
    _train,
)
from ._common import COMMON, Parser, UsageError

_COMMANDS = {
    "train": _train,
    "eval": _eval,
    "fold": _fold,
    "export": _export,
    "predict": _predict,
    "quantize": _quantize,
    "inspect": _inspect,
    "bench": _bench,
    "bench plot": _bench_plot,
    "compare": _compare,
    "compare report": _compare_report,
    "import-checkpoint": _import_checkpoint,
    "convert-weights": _convert_weights,
    "methods": _methods,
    "completion": _completion,
}
_EXTRAS = {"filelock", "lightning", "matplotlib", "rich", "scipy", "shtab", "sklearn", "timm", "torchvision"}
_EXTRAS |= {"yaml"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0 for success, 1 for an error, 2 for wrong usage, 130 after Ctrl-C. Errors are one line on
        standard error; with ``--debug`` their traceback comes before it.

    >>> main(["--version"])
    foldconv ...
    0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:  # wrong usage still, for a script that has lost its command
        _report(parser().format_help().rstrip("\n"))
        return 2
    try:
        options = parse(arguments)
        with _telling() as options.told:
            result, text = options.run(options)
        for line in options.told:
            _report(f"foldconv: {line}")
        _print(json.dumps(result, indent=2) if options.json else text, sys.stdout)
        return 0
    except SystemExit as stop:  # argparse, after --help and --version
        return int(stop.code or 0)
    except UsageError as error:
        _report(f"{error.program}: {error}; see {error.program} --help")
        return 2
    except BrokenPipeError:  # the reader of our output has left: nothing to tell, and nobody to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        _report(f"foldconv: {str(error) or 'interrupted'}")
        return 130
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        _report(f"foldconv: error: {_one_line(error)}")
        return 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        UsageError: with the nearest name of an option or a command that nobody knows.

    >>> options = parse(["compare", "report", "comparison"])
    >>> options.command, options.folder
    ('compare report', 'comparison')
    """
    if " ".join(arguments[:2]) in _COMMANDS:
        arguments = [" ".join(arguments[:2]), *arguments[2:]]
    options, others = parser().parse_known_args(arguments)
    if others:
        name = next((word for word in others if word.startswith("-")), others[0]).partition("=")[0]
        own, prefix = options.parser.options(), f"{options.command} "
        own += [command.removeprefix(prefix) for command in _COMMANDS if command.startswith(prefix)]
        options.parser.error(unknown("argument", name, own))
    return options


def parser(nested: bool = True) -> Parser:
    """The parser of all commands; `nested`: with those of two words."""
    whole = Parser(
        prog="foldconv",
        description="Train with a richer convolution, deploy a plain one.",
        epilog="example: foldconv train --method doconv --epochs 10",
    )
    whole.add_argument("--version", action="version", version=f"foldconv {__version__}")
    commands = whole.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        if " " in name and not nested:
            continue
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog="examples:\n" + "\n".join(f"  {example}" for example in module.EXAMPLES),
            parents=[COMMON],
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command, parser_of_all=parser)
    return whole


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _EXTRAS:
        return f"this needs the training extras (no {error.name}); install them: {install('train')}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    # Errors of our own explain themselves; of others' the kind is half of the message.
    from ...errors import FoldConvError

    ours = isinstance(error, (FoldConvError, OSError))
    ours |= isinstance(error, ModuleNotFoundError) and "; install it: " in text
    return " ".join((text if ours else f"{type(error).__name__}: {text} (--debug shows where)").split())


class _Teller(logging.Handler):
    """Keeps what is said until the command has ended, for an error is one line alone."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def _telling() -> Iterator[list[str]]:
    """The lines about what was read: which weights of somebody's file or of a run, which files of a folder."""
    names = "foldconv.files.weights", "foldconv.lab.train.checkpoint", "foldconv.lab.data.folders"
    teller, levels = _Teller(), {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.addHandler(teller)
        logger.setLevel(logging.INFO)
    try:
        yield teller.lines
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
            logger.removeHandler(teller)


def _report(line: str) -> None:
    _print(line, sys.stderr)


def _print(text: str, stream: Any) -> None:
    """Print; where a stream's encoding has no such characters (Windows' pipes), with others in their place."""
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        simple = text.replace("─", "-").encode(stream.encoding, errors="replace")
        print(simple.decode(stream.encoding), file=stream, flush=True)
