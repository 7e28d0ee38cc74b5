"""Recipes: settings of published trainings as YAML, one file per network; README.md has the tables they are from."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import UnsupportedError, unknown

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The recipes that come with foldconv, as ``--config`` takes them.

    >>> "gluoncv/resnet50_v1b" in names()
    True
    """
    files = (path for path in _FOLDER.rglob("*.yaml") if not path.name.startswith("_"))
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in files)


def find(config: str | os.PathLike[str]) -> Path:
    """The file of a configuration: a YAML file of the user's, or else the recipe of that name.

    Raises:
        UnsupportedError: neither of the two; the nearest recipe is named.

    >>> find("digits").name
    'digits.yaml'
    >>> find("gluoncv/resnet50")
    Traceback (most recent call last):
    foldconv.errors.UnsupportedError: config: no file and unknown recipe 'gluoncv/resnet50'; did you mean ...
    """
    if os.path.isfile(config):
        return Path(config)
    known, name = names(), Path(config).as_posix().removesuffix(".yaml")
    if name in known:
        return _FOLDER / f"{name}.yaml"
    raise UnsupportedError(
        f"config: no file and {unknown('recipe', str(config), known)} (foldconv train --config list shows all)"
    )
