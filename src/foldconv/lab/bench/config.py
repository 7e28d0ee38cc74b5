"""`BenchConfig`: what is measured, as plain values that survive JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...errors import UnsupportedError, unknown
from ..machine import portable

WHAT = ("step", "eval", "fold", "memory", "kept", "loop")
CLOCKS = ("wall", "cpu")
PATHS = ("auto", "gpu", "cpu", "blocks", "torch")
DEVICES = ("cpu", "cuda")
COMPOSITIONS = ("kernel", "feature")


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """One run of measurements.

    `batch` and `size` are taken in pairs; one of them may have a single value, which then goes with all of the other.

    Raises:
        UnsupportedError: a value that is not one of those expected (the nearest is given), or lists of two lengths.

    >>> BenchConfig("resnet18", batch=(8, 32), size=(224, 64)).cases
    [(8, 224), (32, 64)]
    >>> BenchConfig("resnet18", batch=(1, 2), size=(64,)).cases
    [(1, 64), (2, 64)]
    >>> BenchConfig("resnet18", what=("setp",))
    Traceback (most recent call last):
    foldconv.errors.UnsupportedError: what: unknown value 'setp'; did you mean 'step'?; expected one of: step, eval, ...
    """

    network: str = _option("resnet18", "a name of the zoo, timm, torchvision")
    batch: tuple[int, ...] = _option((8,), "images per step, in pairs with --size")
    size: tuple[int, ...] = _option((224,), "height and width of the images in pixels")
    methods: tuple[str, ...] = _option(
        ("doconv", "orepa", "dbb"), "methods; options follow a name as in doconv:depth_multiplier=12"
    )
    what: tuple[str, ...] = _option(("step",), f"what to measure: {', '.join(WHAT)}")
    steps: int = _option(10, "rounds; each runs every contestant once")
    path: tuple[str, ...] = _option(("auto",), f"how kernels are composed: {', '.join(PATHS)}")
    device: str = _option("cpu", f"where: {', '.join(DEVICES)}")
    composition: tuple[str, ...] = _option(
        ("kernel",), f"for methods that have the choice: {', '.join(COMPOSITIONS)}; others run as they are"
    )
    amp: bool = _option(False, "run forward and loss under autocast, in bfloat16")
    channels_last: bool = _option(False, "keep weights and images in the channels-last memory format")
    clock: str = _option("wall", "what counts: wall, or cpu: the process's own time, on one thread")

    def __post_init__(self):
        expected = {"what": WHAT, "path": PATHS, "composition": COMPOSITIONS, "device": DEVICES, "clock": CLOCKS}
        for name, known in expected.items():
            value = getattr(self, name)
            for word in (value,) if isinstance(value, str) else value:
                if word not in known:
                    raise UnsupportedError(f"{name}: {unknown('value', word, known)}")
        for name in ("batch", "size", "methods", "what", "path", "composition"):
            value = getattr(self, name)
            if not value or (len(set(value)) < len(value) and name not in ("batch", "size")):
                raise UnsupportedError(f"{name}: expected one or more values, each once, received {list(value)}")
        for name in ("batch", "size"):
            if min(getattr(self, name)) < 1:
                raise UnsupportedError(f"{name}: expected numbers ≥ 1, received {list(getattr(self, name))}")
        if self.steps < 1:
            raise UnsupportedError(f"steps: expected a number ≥ 1, received {self.steps}")
        if (self.clock, self.device) == ("cpu", "cuda"):
            raise UnsupportedError("clock: a GPU's work is no time of the process; expected wall with device cuda")
        if len(self.batch) != len(self.size) and 1 not in (len(self.batch), len(self.size)):
            raise UnsupportedError(
                f"batch and size are taken in pairs, received {len(self.batch)} and {len(self.size)} values; give as "
                "many of both, or one of either"
            )

    @property
    def cases(self) -> list[tuple[int, int]]:
        """The pairs of batch and size."""
        number = max(len(self.batch), len(self.size))
        return list(zip(self.batch * (number // len(self.batch)), self.size * (number // len(self.size))))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def command(self, out: str | None = None) -> str:
        """The command line that repeats this run.

        >>> BenchConfig("resnet18", steps=3, amp=True).command()
        'foldconv bench resnet18 --steps 3 --amp'
        """
        words = ["foldconv bench", self.network]
        for field in dataclasses.fields(self)[1:]:
            value, option = self.to_dict()[field.name], "--" + field.name.replace("_", "-")
            if getattr(self, field.name) == field.default:
                continue
            if value is True:
                words += [option]
            else:
                words += [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
        return " ".join(words if out is None else [*words, "--out", portable(out)])
