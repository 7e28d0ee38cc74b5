"""Classes and functions of the user's own, named as ``package.module:Name``."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import UnsupportedError

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def names_code(name: Any) -> bool:
    """Whether a name means something to import: code that runs. A name out of somebody else's file must not be one.

    >>> names_code("my.nets:Net"), names_code("resnet18"), names_code("flowers/set.npz"), names_code(None)
    (True, False, False, False)
    """
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def imported(name: str, what: str = "class") -> Any:
    """What a name means; modules beside where the user stands are found, as with ``python -m``.

    Raises:
        UnsupportedError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        with working_directory_found():
            return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedError(f"{name}: expected a {what} that can be imported, received: {reason}") from error


@contextlib.contextmanager
def working_directory_found() -> Iterator[None]:
    """Imports find modules in the working directory, too."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)
