"""What the methods cost: paired measurements in one process, kept as JSON, drawn as a picture.

Imported by name as needed: a config alone needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import BenchConfig as BenchConfig

if TYPE_CHECKING:
    from .measure import measure as measure
    from .plot import plot as plot
    from .report import table as table

_HOME = {"measure": "measure", "plot": "plot", "table": "report"}

__all__ = ["BenchConfig", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # A function has its module's name here, as `plot`; the module stays reachable by its full name.
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
