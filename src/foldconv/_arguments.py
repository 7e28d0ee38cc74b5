"""Arguments of another type than was meant are refused in one line, before anything is done with them."""

from __future__ import annotations

import math
import os
from typing import Any

from .errors import UnsupportedError, shown


def expect(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise a TypeError for a value that is none of these types.

    >>> expect("names", ["a"], dict, "a dictionary")
    Traceback (most recent call last):
    TypeError: names: expected a dictionary, received ['a']
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, received {shown(value)}")


def expect_flags(**flags: object) -> None:
    """Raise a TypeError for a flag that is neither True nor False: 'no' would count as True.

    >>> expect_flags(inplace=True, check="no")
    Traceback (most recent call last):
    TypeError: check: expected True or False, received 'no'
    """
    for name, value in flags.items():
        expect(name, value, bool, "True or False")


def expect_path(path: object) -> None:
    """Raise a TypeError for what is no path: open() would take a number for an open file."""
    expect("path", path, (str, os.PathLike), "a path")


def expect_number(name: str, value: Any, lowest: float = -math.inf) -> None:
    """Raise for what is no finite number from `lowest` on.

    >>> expect_number("eps", float("nan"), 0)
    Traceback (most recent call last):
    foldconv.errors.UnsupportedError: eps: expected a number ≥ 0, received nan
    """
    expected = "a number" if lowest == -math.inf else f"a number ≥ {lowest:g}"
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected {expected}, received {shown(value)}")
    try:
        good = math.isfinite(value) and value >= lowest
    except (TypeError, ValueError, OverflowError, RuntimeError):  # arrays of several
        good = False
    if not good:
        raise UnsupportedError(f"{name}: expected {expected}, received {shown(value)}")
