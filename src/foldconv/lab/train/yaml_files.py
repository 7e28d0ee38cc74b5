"""Settings in YAML files, and in the place of others."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError, shown
from .config import TrainConfig

_LONGEST, _DEEPEST = 1 << 18, 50


def over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Settings in the place of a base's.

    A value is replaced as a whole, a mapping such as `method_args` too. Options of one method, schedule or architecture
    mean nothing to another: where that is replaced, they go with it.

    >>> over({"schedule": "step", "schedule_args": {"factor": 0.1}, "lr": 0.1}, {"schedule": "cosine"})
    {'schedule': 'cosine', 'lr': 0.1}
    """
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    named = {**defaults, **base}
    replaced = {f"{name}_args" for name, value in values.items() if value != named.get(name)}
    return {**{name: value for name, value in base.items() if name not in replaced}, **values}


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A mapping from a YAML file, as plain values; never runs code.

    The key ``base`` names another such file, relative to the one that names it, whose values stand where this one has
    none (`over`). The key itself is not among the values.

    Raises:
        FileNotFoundError: no such file, or no such base.
        UnsupportedError: not YAML, not a mapping, or files that are each other's base.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "long.yaml").write_text("epochs: 100\\nlr: 0.4")
    ...     _ = Path(folder, "short.yaml").write_text("base: long.yaml\\nepochs: 5")
    ...     read_yaml(Path(folder, "short.yaml"))
    {'epochs': 5, 'lr': 0.4}
    """
    values: dict[str, Any] = {}
    read: list[str] = []
    file: Path | None = Path(path)
    while file is not None:
        mapping = _read_mapping(file)
        read.append(os.path.realpath(file))
        base = mapping.pop("base", None)
        values = over(mapping, values)
        file = None if base is None else _base_of(file, base, read)
    return values


def _base_of(file: Path, base: Any, read: list[str]) -> Path:
    """The file that another one names as its base, after those that were read on the way to it."""
    if not isinstance(base, str) or not base:
        raise UnsupportedError(f"{file}: base: expected the path of a YAML file, received {shown(base)}")
    found = file.parent / base
    if not found.is_file():
        raise FileNotFoundError(
            f"{file}: base: expected a YAML file, found none at {found}; give its path from the folder {file.parent}"
        )
    if os.path.realpath(found) in read:
        names = " -> ".join(Path(name).name for name in [*read, os.path.realpath(found)])
        raise UnsupportedError(f"{file}: base: expected a file without this one as its base, received a loop: {names}")
    return found


def _read_mapping(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        _check_size(text)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers that there are not
        raise UnsupportedError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UnsupportedError(f"{path}: expected a mapping such as 'epochs: 3', received {type(values).__name__}")
    return values


def _check_size(text: str) -> None:
    """PyYAML takes the square of the depth of brackets, and a second for a hundred kilobytes."""
    if len(text) > _LONGEST:
        raise ValueError(f"expected a configuration of at most {_LONGEST:,} characters, received {len(text):,}")
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        if depth > _DEEPEST:
            raise ValueError(f"nested over {_DEEPEST} levels deep")
