"""What can go wrong, by name. A message says what, where, expected, received and the remedy, in one line."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any


class FoldConvError(Exception):
    """Base of every error that foldconv raises on purpose.

    >>> issubclass(NoMatchError, FoldConvError) and issubclass(NoMatchError, ValueError)
    True
    """


class NoMatchError(FoldConvError, ValueError):
    """`expand` found no convolution to replace."""


class FoldMismatchError(FoldConvError):
    """A folded layer does not compute what the original computes, or holds values that are not finite."""


class UnsupportedError(FoldConvError, ValueError):
    """There is no exact way to do what was asked; the message says why."""


class CheckpointError(FoldConvError, ValueError):
    """A file is not a checkpoint of the expected kind, or does not fit the network."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint such as ``"; did you mean 'doconv'?"``, or an empty string when nothing is near.

    >>> nearest("docnv", ["doconv", "orepa"])
    "; did you mean 'doconv'?"
    >>> nearest("xyz", ["doconv"])
    ''
    """
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def unknown_option(option: str, candidates: Iterable[str]) -> str:
    """What is wrong with an option that nobody knows: the nearest one, or where none is near, all of them.

    >>> unknown_option("widht", ["depth", "width"])
    "no option 'widht'; did you mean 'width'?"
    >>> unknown_option("xyz", ["depth", "width"])
    "no option 'xyz'; expected some of: depth, width"
    """
    known = list(candidates)
    listed = f"; expected some of: {', '.join(known)}" if known else ""
    return f"no option {option!r}{nearest(option, known) or listed}"


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
