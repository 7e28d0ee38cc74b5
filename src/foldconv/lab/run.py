"""`RunFolder`: what a training run leaves behind, and what each file of it is called."""

from __future__ import annotations

import os
from pathlib import Path


class RunFolder:
    """The files of a run; whether they are there is another question.

    Args:
        path: of the folder.

    >>> RunFolder("runs/first").checkpoint.as_posix()
    'runs/first/last.ckpt'
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.branches = self.path / "branches.csv"
        self.checkpoint = self.path / "last.ckpt"
        self.folded = self.path / "folded.safetensors"
        self.curves = self.path / "curves.png"
        self.result = self.path / "result.json"

    def checkpoints(self, keep: int = 2) -> list[Path]:
        """The newest checkpoint and those before it, as many as are kept.

        >>> [path.name for path in RunFolder("run").checkpoints(3)]
        ['last.ckpt', 'previous.ckpt', 'previous-2.ckpt']
        """
        older = ["previous.ckpt", *(f"previous-{number}.ckpt" for number in range(2, keep))]
        return [self.checkpoint, *(self.path / name for name in older)][:keep]

    def __str__(self) -> str:
        return str(self.path)
