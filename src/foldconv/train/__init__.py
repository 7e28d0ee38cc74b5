"""Training on Lightning: `TrainConfig` says what, `fit` does it, `open_network` reads what came out.

Imported by name as needed: a config alone needs neither torch nor Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import TrainConfig as TrainConfig

if TYPE_CHECKING:
    from .checkpoint import open_network as open_network
    from .classifier import Classifier as Classifier
    from .data import ImageData as ImageData
    from .data import create_data as create_data
    from .data import list_data as list_data
    from .evaluation import evaluate as evaluate
    from .experiment import TrainResult as TrainResult
    from .experiment import fit as fit
    from .experiment import resume as resume

_HOME = {
    "Classifier": "classifier",
    "ImageData": "data",
    "TrainResult": "experiment",
    "create_data": "data",
    "evaluate": "evaluation",
    "fit": "experiment",
    "list_data": "data",
    "open_network": "checkpoint",
    "resume": "experiment",
}

__all__ = ["TrainConfig", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
