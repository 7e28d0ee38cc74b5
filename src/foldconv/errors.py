"""What can go wrong, by name. A message says what, where, expected, received and the remedy, in one line."""

from __future__ import annotations

import difflib
import inspect
import re
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_LISTED = 24
"""Names that a message lists at most; timm alone has more than a thousand networks."""
_LONGEST = 2000
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # would steer a terminal, or fit no encoding
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 4
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class FoldConvError(Exception):
    """Base of every error that foldconv raises on purpose; whatever a file put into its message, it is one short line.

    >>> issubclass(NoMatchError, FoldConvError) and issubclass(NoMatchError, ValueError)
    True
    >>> str(FoldConvError("two\\nlines")), len(str(FoldConvError("x" * 10**6)))
    ('two lines', 2000)
    """

    def __init__(self, *args: object):
        super().__init__(*(_one_line(each) if isinstance(each, str) else each for each in args))


class NoMatchError(FoldConvError, ValueError):
    """`expand` found no convolution to replace."""


class FoldMismatchError(FoldConvError):
    """A folded layer does not compute what the original computes, or holds values that are not finite."""


class UnsupportedError(FoldConvError, ValueError):
    """There is no exact way to do what was asked; the message says why."""


class CheckpointError(FoldConvError, ValueError):
    """A file is not a checkpoint of the expected kind, or does not fit the network."""


def _one_line(text: str) -> str:
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[: half - 3]} ... {text[2 - half :]}"
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], " ".join(text.splitlines()))


def shown(value: object) -> str:
    """A value from somebody's file, for a message: its `repr`, short however large or nested the value is.

    >>> shown("docnv"), len(shown("x" * 10**6)) < 100, shown([[[[[["deep"]]]]]] * 9)
    ("'docnv'", True, '[[[[...]]], [[[...]]], [[[...]]], [[[...]]], ...]')
    """
    try:
        text = _SHORT.repr(value)
    except Exception:  # Python refuses to print integers of thousands of digits; objects may do as they like
        text = type(value).__name__
    return _one_line(text if len(text) <= 200 else f"{text[:196]} ...")


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint such as ``"; did you mean 'doconv'?"``, or an empty string when nothing is near.

    >>> nearest("docnv", ["doconv", "orepa"])
    "; did you mean 'doconv'?"
    >>> nearest("xyz", ["doconv"])
    ''
    """
    if len(name) > 80:  # the comparison takes the square of it
        return ""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def unknown(what: str, received: object, known: Iterable[object]) -> str:
    """What to say of a name that nobody knows: what it was to name, the nearest known one, and those that there are.

    >>> unknown("method", "docnv", ["acnet", "doconv"])
    "unknown method 'docnv'; did you mean 'doconv'?; expected one of: acnet, doconv"
    >>> unknown("option", "depth", [])
    "unknown option 'depth'; expected none"
    """
    names = [str(name) for name in known]
    listed = ["one of: ", ", ".join(names[:_LISTED]), ", ..." * (len(names) > _LISTED)] if names else ["none"]
    name = received if isinstance(received, str) else shown(received)
    return f"unknown {what} {shown(received)}{nearest(name, names)}; expected {''.join(listed)}"


def install(extra: str) -> str:
    """The command that brings what an extra of foldconv's needs, whether this is a checkout or an installed wheel.

    Of a distribution that is installed, pip and uv take the extra from what is there, and ask no index for foldconv.

    >>> install("train").startswith("pip install ")
    True
    """
    root = Path(__file__).resolve().parents[2]
    checkout = (root / "pyproject.toml").is_file() and (root / "src" / "foldconv").is_dir()
    return f'pip install -e "{root}[{extra}]"' if checkout else f'pip install "foldconv[{extra}]"'


def refused_option(error: Exception) -> str | None:
    """The keyword argument that Python's own message says a callable does not take; None for any other error.

    >>> try:
    ...     dict.fromkeys([], wdith=3)
    ... except TypeError as error:
    ...     refused_option(error)
    >>> try:
    ...     nearest("a", [], wdith=3)
    ... except TypeError as error:
    ...     refused_option(error)
    'wdith'
    """
    found = re.search(r"got an unexpected keyword argument '([^']+)'", str(error))
    return found[1] if found and isinstance(error, TypeError) else None


def option_names(*callables: Callable[..., Any]) -> list[str]:
    """The arguments of callables that have a default, by name.

    >>> option_names(sorted)
    ['key', 'reverse']
    """
    found: dict[str, None] = {}
    for each in callables:
        for name, parameter in inspect.signature(each).parameters.items():
            if parameter.default is not parameter.empty:
                found[name] = None
    return list(found)
