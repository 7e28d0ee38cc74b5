"""The values of a config's fields: of their types, and within their ranges."""

from __future__ import annotations

import contextlib
import math
import typing
from typing import Any, Literal

from ...errors import UnsupportedError, shown

Patterns = str | list[str] | None
"""Glob patterns on the names of layers: none, one, or several."""


def convert(name: str, value: Any, hint: Any) -> Any:
    """The value as its field's type; YAML reads ``1e-2`` as text, so text is tried as a number."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UnsupportedError(f"{name}: expected one of {', '.join(choices)}, received {shown(value)}")
        return value
    kinds = set(typing.get_args(hint)) or {hint}
    if value is None:
        if type(None) in kinds:
            return None
        raise UnsupportedError(f"{name}: expected {_EXPECTED.get(hint, 'KEY: VALUE pairs')}, received None")
    if bool in kinds and isinstance(value, bool):
        return value
    if kinds & {int, float} and not isinstance(value, bool):
        kind: Any = int if int in kinds else float
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        with contextlib.suppress(OverflowError):
            if number is not None and float(value) == number:  # 2.5 epochs are not 2
                return number
    elif str in kinds and isinstance(value, str) and (value or type(None) in kinds):
        return value
    elif hint == Patterns and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return list(value)
    elif typing.get_origin(hint) is dict and isinstance(value, dict):
        return dict(value)
    raise UnsupportedError(f"{name}: expected {_EXPECTED.get(hint, 'KEY: VALUE pairs')}, received {shown(value)}")


def expect_in_range(name: str, value: Any) -> None:
    """Refuse a number that is out of its field's range."""
    lowest, highest = RANGES[name]
    if value is not None and not lowest <= value < highest:
        below = "" if highest == math.inf else f" and < {highest}"
        raise UnsupportedError(f"{name}: expected a number ≥ {lowest}{below}, received {shown(value)}")


_EXPECTED = {
    int: "an integer",
    int | None: "an integer",
    float: "a number",
    str: "text",
    str | None: "text",
    bool: "true or false",
    bool | int: "true, false or how many images",
    bool | str: "true, false or the path of a checkpoint",
    Patterns: "a pattern or a list of patterns",
}
RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, math.inf),
    "batch_size": (2, math.inf),
    "image_size": (1, math.inf),
    "accumulate": (1, math.inf),
    "devices": (-1, math.inf),
    "nodes": (1, math.inf),
    "keep": (1, math.inf),
    "label_smoothing": (0, 1),
    "ema": (0, 1),
    "split": (0.001, 1),
}
RANGES |= dict.fromkeys(("lr", "momentum", "weight_decay", "warmup_epochs", "clip_gradient"), (0, math.inf))
RANGES |= dict.fromkeys(("stem_lr_factor", "bias_lr_factor", "norm_bias_lr_factor", "mixup", "cutmix"), (0, math.inf))
RANGES |= dict.fromkeys(("seed", "threads", "workers", "holdout", "patience"), (0, math.inf))
