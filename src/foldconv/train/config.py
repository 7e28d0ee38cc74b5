"""`TrainConfig`: everything that decides how a network is trained, as plain values that survive YAML and JSON."""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from pathlib import Path
from typing import Any, Literal

from .._files import atomic_path
from ..errors import UnsupportedError, nearest

PLAIN = "plain"
"""The method that expands nothing: the baseline."""


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults train the embedded digits in well under a minute on two cores.

    Raises:
        UnsupportedError: an unknown key (the nearest is given), or a value of the wrong type or range.

    >>> TrainConfig(epochs=3).run_name
    'digits-digits_resnet-doconv'
    >>> TrainConfig.from_dict({"epochs": 3, "lr": "1e-2"}).lr
    0.01
    >>> TrainConfig.from_dict({"epoch": 3})
    Traceback (most recent call last):
    foldconv.errors.UnsupportedError: unknown config key 'epoch'; did you mean 'epochs'?
    """

    data: str = _option("digits", "data set: digits (scikit-learn's 1797 handwritten digits, 8x8 pixels)")
    architecture: str = _option("digits_resnet", "network: a name of the zoo, of timm or of torchvision")
    architecture_args: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"help": "its options"})
    method: str = _option("doconv", "method that expands the convolutions; 'plain' for none")
    method_args: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"help": "its options"})
    init: Literal["paper", "preserve"] = _option("paper", "initialization: the paper's, or preserve the function")
    epochs: int = _option(20, "passes over the training images")
    batch_size: int = _option(64, "images per step")
    lr: float = _option(0.1, "highest learning rate of the schedule")
    momentum: float = _option(0.9, "momentum of SGD")
    weight_decay: float = _option(5e-4, "weight decay, where it belongs: not on biases, norms and gates")
    schedule: Literal["onecycle", "cosine"] = _option("onecycle", "learning rate over the run, step by step")
    seed: int = _option(0, "seed of initialization and order of images")
    accelerator: str = _option("auto", "where to train: auto, cpu, gpu, mps")
    threads: int = _option(0, "processor threads; 0: one for images below 32x32 pixels, else as torch decides")
    out: str | None = _option(None, "run folder, new; default: runs/DATA-ARCHITECTURE-METHOD, numbered when it exists")

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, _convert(name, getattr(self, name), hint))
        at_least = {"epochs": 1, "batch_size": 2} | dict.fromkeys(
            ("lr", "momentum", "weight_decay", "seed", "threads"), 0
        )
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if not lowest <= value < math.inf:
                raise UnsupportedError(f"{name}: expected a number ≥ {lowest}, received {value}")

    @property
    def run_name(self) -> str:
        """What the run folder is called unless `out` says otherwise."""
        return f"{self.data}-{self.architecture}-{self.method}".replace("/", "-")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """A config from plain values; what is absent gets its default."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                hint = nearest(str(key), known) or f"; expected some of: {', '.join(known)}"
                raise UnsupportedError(f"unknown config key {key!r}{hint}")
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as YAML. `out` is left out: the same file can start another run."""
        import yaml

        values = self.to_dict()
        del values["out"]
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """Read a YAML (or JSON, which is YAML) file."""
        return cls.from_dict(read_yaml(path))


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A mapping from a YAML file, as plain values; never runs code.

    Raises:
        FileNotFoundError: no such file.
        UnsupportedError: not YAML, or not a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnsupportedError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UnsupportedError(f"{path}: expected a mapping such as 'epochs: 3', received {type(values).__name__}")
    return values


def _convert(name: str, value: Any, hint: Any) -> Any:
    """The value as its field's type; YAML reads ``1e-2`` as text, so text is tried as a number."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UnsupportedError(f"{name}: expected one of {', '.join(choices)}, received {value!r}")
        return value
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = hint(value)
        except (TypeError, ValueError):
            number = None
        if number is not None and float(value) == number:  # 2.5 epochs are not 2
            return number
    elif hint is str and isinstance(value, str) and value:
        return value
    elif typing.get_origin(hint) is dict and isinstance(value, dict):
        return dict(value)
    elif hint == (str | None) and (value is None or isinstance(value, str)):
        return value
    expected = {int: "an integer", float: "a number", str: "text"}.get(hint, "text" if hint == (str | None) else "")
    raise UnsupportedError(f"{name}: expected {expected or 'KEY: VALUE pairs'}, received {value!r}")
