"""What can go wrong, by name. A message says what, where, expected, received and the remedy, in one line."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

_LISTED = 24
"""Names that a message lists at most; timm alone has more than a thousand networks."""


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


def unknown(what: str, received: object, known: Iterable[object]) -> str:
    """What to say of a name that nobody knows: what it was to name, the nearest known one, and those that there are.

    >>> unknown("method", "docnv", ["acnet", "doconv"])
    "unknown method 'docnv'; did you mean 'doconv'?; expected one of: acnet, doconv"
    >>> unknown("option", "depth", [])
    "unknown option 'depth'; expected none"
    """
    names = [str(name) for name in known]
    shown = ["one of: ", ", ".join(names[:_LISTED]), ", ..." * (len(names) > _LISTED)] if names else ["none"]
    return f"unknown {what} {received!r}{nearest(str(received), names)}; expected {''.join(shown)}"


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
