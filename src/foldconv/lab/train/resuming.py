"""Checkpoints to resume from: written whole, the ones before kept, a damaged one passed over."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from ...errors import CheckpointError
from ...files.atomic import atomic_path
from ...files.reading import read_safely
from ..run import RunFolder


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are never half written, and never unpickled; the ones before stay under other names.

    Args:
        keep: how many there are, the newest included.
    """

    def __init__(self, keep: int = 1):
        super().__init__()
        self._keep = keep

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the previous checkpoint, then take its place; at each moment the newest name is there."""
        with atomic_path(path) as temporary:
            with open(temporary, "wb") as file:  # torch hides the reason when it cannot write to a path
                torch.save(checkpoint, file)
            names = RunFolder(Path(path).parent).checkpoints(self._keep)
            for newer, older in reversed(list(itertools.pairwise(names))):
                if newer.is_file():
                    _second_name(newer, older)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Tensors and plain values only, whatever was asked."""
        return read_safely(path)


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


def _second_name(source: Path, target: Path) -> None:
    """`target` becomes another name of `source`'s file, in one step; where there are no links, `source` is moved."""
    temporary = target.with_name(f".tmp-{target.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        os.replace(source, target)
    else:
        os.replace(temporary, target)
