"""What can go wrong, by name. A message says what, where, expected, received and the remedy, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
