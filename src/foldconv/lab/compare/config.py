"""`CompareConfig`: which methods, how many seeds, trained how; and the jobs that this makes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from ...files.atomic import atomic_path
from ..train.config import PLAIN, TrainConfig, read_yaml

FORMAT = "foldconv-compare-1"
CONFIG = "compare.yaml"
_PER_JOB = ("method", "method_args", "seed", "out", "baseline")
"""What the jobs differ in; everything else of a `TrainConfig` is the same for all."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run: a method with a seed, in a folder of its own.

    >>> Job("orepa:large=plain", 3, Path("runs")).folder.as_posix()
    'runs/orepa-large=plain/seed-3'
    """

    method: str
    """As the user wrote it, with options."""
    seed: int
    root: Path

    @property
    def folder(self) -> Path:
        """The run folder of ``foldconv train``."""
        return self.root / folder_name(self.method) / f"seed-{self.seed}"

    def beside(self, suffix: str) -> Path:
        """A file of ours about this job, beside its run folder: ``.yaml``, ``.log`` or ``.json``."""
        return self.folder.with_name(self.folder.name + suffix)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Methods, seeds and the training that is the same for all.

    The seeds are ``train.seed``, ``train.seed + 1``, and so on.

    Raises:
        UnsupportedError: no method, one of them twice, less than one seed, or `method_args` in `train`.

    >>> config = CompareConfig(("plain", "doconv"), seeds=2, train=TrainConfig(epochs=3))
    >>> [(job.seed, job.method) for job in config.jobs("runs")]
    [(0, 'plain'), (0, 'doconv'), (1, 'plain'), (1, 'doconv')]
    """

    methods: tuple[str, ...] = (PLAIN, "doconv")
    """The first is the baseline; options follow a name as in ``orepa:large=plain``."""
    seeds: int = 10
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self):
        folders = {folder_name(method).casefold() for method in self.methods}  # some disks see no difference of case
        if not self.methods or not all(self.methods) or len(folders) < len(self.methods):
            raise UnsupportedError(f"methods: expected one or more, each once, received {','.join(self.methods)!r}")
        if self.seeds < 1:
            raise UnsupportedError(f"seeds: expected a number ≥ 1, received {self.seeds}")
        if self.train.method_args:
            raise UnsupportedError(
                "method_args: would go to every method; give options with the method's name, as in "
                "--methods plain,doconv:depth_multiplier=12"
            )

    def jobs(self, root: str | os.PathLike[str]) -> list[Job]:
        """All runs, seed by seed over the methods: a machine that gets slower meanwhile does so for all alike."""
        first = self.train.seed
        return [Job(m, seed, Path(root)) for seed in range(first, first + self.seeds) for m in self.methods]

    def shared(self) -> dict[str, Any]:
        """The training options that all jobs share, as plain values; `seed` is the first one."""
        return {name: value for name, value in self.train.to_dict().items() if name not in _PER_JOB or name == "seed"}

    def job_config(self, job: Job) -> TrainConfig:
        """What one job trains with; ``{seed}`` in the path of pretrained weights is its seed.

        >>> config = CompareConfig(train=TrainConfig(pretrained="runs/plain/seed-{seed}", init="preserve"))
        >>> config.job_config(Job("plain", 3, Path("fine-tuned"))).pretrained
        'runs/plain/seed-3'

        Raises:
            UnsupportedError: an unknown method or option.
        """
        name, options = method_and_options(job.method)
        start = self.train.pretrained
        if isinstance(start, str):
            start = start.replace("{seed}", str(job.seed))
        settings: dict[str, Any] = {"method_args": options, "pretrained": start, "out": None, "baseline": False}
        return dataclasses.replace(self.train, method=name, seed=job.seed, **settings)

    def save(self, root: str | os.PathLike[str]) -> None:
        """Write into the folder as compare.yaml."""
        import yaml

        values = {"format": FORMAT, "methods": list(self.methods), "seeds": self.seeds, "train": self.shared()}
        with atomic_path(Path(root, CONFIG)) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, root: str | os.PathLike[str]) -> CompareConfig:
        """What `save` wrote.

        Raises:
            UnsupportedError: not a folder of a comparison, or its config is damaged.
        """
        path = Path(root, CONFIG)
        if not path.is_file():
            raise UnsupportedError(f"{root}: not the folder of a comparison: it has no {CONFIG}")
        values = read_yaml(path)
        methods, seeds, train = values.get("methods"), values.get("seeds"), values.get("train")
        if values.get("format") != FORMAT:
            raise UnsupportedError(f"{path}: expected format {FORMAT!r}, received {values.get('format')!r}")
        if not (isinstance(methods, list) and isinstance(seeds, int) and isinstance(train, dict)):
            raise UnsupportedError(f"{path}: damaged: expected a list 'methods', a number 'seeds', a mapping 'train'")
        return cls(tuple(map(str, methods)), seeds, TrainConfig.from_dict(train))

    def check_continues(self, old: CompareConfig, root: str | os.PathLike[str]) -> None:
        """Whether this can go on in the folder of `old`: more methods and more seeds may come, nothing may change.

        Raises:
            UnsupportedError: something did change; every such key is named.
        """
        before, now = old.shared(), self.shared()
        changed = [f"{key} (was {before.get(key)!r}, now {now[key]!r})" for key in now if before.get(key) != now[key]]
        if self.methods[0] != old.methods[0] or set(old.methods) - set(self.methods):
            changed.append(f"methods (was {','.join(old.methods)}, now {','.join(self.methods)})")
        if self.seeds < old.seeds:
            changed.append(f"seeds (was {old.seeds}, now {self.seeds})")
        if changed:
            raise UnsupportedError(
                f"{root}: holds a comparison with other settings: {'; '.join(changed)}; choose another --out, or go on "
                "with the same settings (methods after the first and seeds may be added)"
            )


def method_and_options(text: str) -> tuple[str, dict[str, Any]]:
    """The method's name and all its options as plain values.

    Raises:
        UnsupportedError: an unknown method or option.

    >>> method_and_options("doconv:depth_multiplier=12")
    ('doconv', {'depth_multiplier': 12, 'composition': 'kernel'})
    >>> method_and_options("plain")
    ('plain', {})
    """
    if text == PLAIN:
        return PLAIN, {}
    from ...methods import method_from_text  # imports torch

    # Through JSON: what is a tuple here is a list in a YAML file.
    options = json.loads(json.dumps(method_from_text(text).to_json()))
    return options.pop("method"), options


def folder_name(method: str) -> str:
    """A method with its options as one part of a path.

    >>> folder_name("dgconv:groups=4:gate=a/b")
    'dgconv-groups=4-gate=a-b'
    """
    return re.sub(r"[^\w.=+-]", "-", method)
