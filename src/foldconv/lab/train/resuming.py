"""Checkpoints to resume from: written whole, the ones before kept, a damaged one passed over."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ...files.atomic import atomic_path
from ...files.reading import read_safely
from ..run import RunFolder


def write_checkpoint(content: dict[str, Any], folder: RunFolder, keep: int) -> None:
    """Write beside the previous checkpoint, then take its place; at each moment the newest name is there.

    Args:
        content: tensors and plain values.
        folder: of the run.
        keep: how many checkpoints there are, the newest included; the ones before get other names.
    """
    with atomic_path(folder.checkpoint) as temporary:
        with open(temporary, "wb") as file:  # torch hides the reason when it cannot write to a path
            torch.save(content, file)
        for newer, older in reversed(list(itertools.pairwise(folder.checkpoints(keep)))):
            if newer.is_file():
                second_name(newer, older)


def newest_readable(folder: RunFolder, keep: int) -> tuple[Path, dict[str, Any], dict[Path, CheckpointError]]:
    """The newest checkpoint of a run that can be read, its content, and what is wrong with newer ones.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    damage: dict[Path, CheckpointError] = {}
    names = [path for path in folder.checkpoints(max(keep, 2)) if path.is_file()]
    if not names:
        raise CheckpointError(f"{folder}: cannot resume here: it has no {folder.checkpoint.name}")
    for path in names:
        try:
            content = read_safely(path)
            if not isinstance(content, dict) or "global_step" not in content:
                raise CheckpointError(f"{path}: expected a checkpoint of a run")
        except CheckpointError as error:
            damage[path] = error
        else:
            return path, content, damage
    raise CheckpointError("; ".join(map(str, damage.values())))


def second_name(source: Path, target: Path) -> None:
    """`target` becomes another name of `source`'s file, in one step; where there are no links, a copy of it."""
    if target.exists() and target.samefile(source):  # a link that replaces itself would stay
        return
    temporary = target.with_name(f".tmp-{target.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
