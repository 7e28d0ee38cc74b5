"""Which method is better, by how much, and how sure is that: several methods trained with the same seeds.

`CompareConfig` says what, `compare` trains what is missing and reports, `report` only reports. Runs of one seed share
the initial weights (where shapes allow) and the order of the images, so their difference is a paired one.

Imported by name as needed: a config alone needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import CompareConfig as CompareConfig
from .config import Job as Job

if TYPE_CHECKING:
    from .reporting import report as report
    from .runner import compare as compare

_HOME = {"compare": "runner", "report": "reporting"}

__all__ = ["CompareConfig", "Job", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
