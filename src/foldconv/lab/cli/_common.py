"""What all commands share: a parser with one-line errors, common options, values given as KEY=VALUE."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ...errors import UnsupportedError, unknown


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


def count(text: str) -> int:
    """A number of things, at least one.

    >>> count("3")
    3
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer ≥ 1, received {text!r}")
    return int(text)


def check_out(*paths: str | os.PathLike[str], force: bool | None = None) -> None:
    """Refuse what cannot be written, before the work; the writing itself checks again.

    `force`: whether a command's --force was given; None for a command without it.

    Raises:
        FileExistsError: the file exists and may not be replaced.
        FileNotFoundError: its folder does not exist.
    """
    for path in paths:
        if not force and os.path.lexists(path):
            remedy = "choose another name" + (", or give --force" if force is not None else "")
            raise FileExistsError(f"{path}: file exists and is not overwritten; {remedy}")
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"{path}: no folder {Path(path).parent} to write into; create it")


def check_picture(path: str | os.PathLike[str]) -> None:
    """`check_out` of a picture, which is a PNG whatever its name says.

    Raises:
        UnsupportedError: its name says something else.
    """
    if Path(path).suffix.lower() != ".png":
        from ...errors import UnsupportedError

        raise UnsupportedError(f"{path}: expected a name that ends in .png; choose such a name")
    check_out(path)


def open_named(options: argparse.Namespace, path: str, expanded: bool = True) -> tuple[Any, dict[str, Any]]:
    """The network that a file holds, with what `add_network_arguments` let the user say; and its description.

    `expanded`: whether --method says what a bare state_dict was expanded with.
    """
    from ..train.checkpoint import open_network

    return open_network(
        path,
        options.architecture,
        pairs(options, "architecture_args"),
        method=options.method if expanded else None,
        method_args=pairs(options, "method_args") if expanded else None,
        weights=options.weights,
        prefix=options.prefix,
    )


def add_labels(parser: Parser) -> None:
    """A file of the classes' names."""
    parser.add_argument("--labels", metavar="FILE", help="classes' names, one a line (default: those of training)")


def labels_of(options: argparse.Namespace, description: dict[str, Any]) -> Any:
    """The classes' names: of the file that ``--labels`` names, or else those of training, if they are known.

    Raises:
        UnsupportedError: the file is no text in UTF-8.
    """
    if not options.labels:
        return description.get("classes")
    try:
        return Path(options.labels).read_text(encoding="utf-8-sig").splitlines()  # a mark at the start is no letter
    except UnicodeDecodeError as error:
        raise UnsupportedError(
            f"--labels {options.labels}: expected text in UTF-8, received the byte {error.object[error.start]:#04x} at "
            f"{error.start}; save it as UTF-8"
        ) from None


@contextlib.contextmanager
def evaluating(subject: str, shape: Sequence[int]) -> Iterator[None]:
    """Says which images a network does not take, or no memory suffices for; torch tells of a layer's tensors.

    Raises:
        UnsupportedError: in place of torch's errors.
    """
    try:
        yield
    except (RuntimeError, TypeError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"{subject}: cannot evaluate images of shape {tuple(shape)}: {reason}") from error


def parameters(network: Any) -> int:
    """How many numbers a network trains."""
    return sum(parameter.numel() for parameter in network.parameters())


def add_checkpoint(parser: Parser) -> None:
    """The file to read."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file or run folder to read; no code in it is run")


def add_network_arguments(parser: Parser, method: str = "method, for a state_dict of an expanded network") -> None:
    """Options for files that do not say which network they are for; `method`: what --method is for."""
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help="network, for a file that does not say which it holds, or that names your own package.module:Class",
    )
    add_pairs(parser, "--architecture-args", "options of the network")
    parser.add_argument("--method", metavar="NAME", help=method)
    add_pairs(parser, "--method-args", "options of that method")
    add_choice(parser)


def add_choice(parser: Parser) -> None:
    """Options for other people's files that hold several sets of weights."""
    parser.add_argument(
        "--weights",
        metavar="ENTRY",
        default="auto",
        help="which of the file's sets of weights, such as state_dict_ema (default: what its trainer validates)",
    )
    parser.add_argument(
        "--prefix",
        metavar="TEXT",
        help="what stands before the network's names in the file, such as model.backbone. (default: what fits)",
    )


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
