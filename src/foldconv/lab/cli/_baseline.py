"""Did it help? The plain network, trained beside the expanded one, and how little one seed shows."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import FoldConvError, UnsupportedError
from ..run import RunFolder, locked
from ..train.config import PLAIN, TrainConfig


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What came of the plain network, if it was trained."""

    result: Any = None
    """Its `TrainResult`."""
    verdict: str = ""
    """What to say below the table."""

    @property
    def values(self) -> dict[str, Any] | None:
        """The result as plain values."""
        return None if self.result is None else dataclasses.asdict(self.result)

    def column(self, count: Callable[[int | None], str]) -> list[tuple[str, ...]]:
        """What goes to the right of the table, row by row."""
        if self.result is None:
            return [()] * 4
        accuracy = f"{100 * self.result.accuracy_folded:.2f} %"
        return [(PLAIN,), (accuracy,), (f"{self.result.parameters_folded:,}",), (count(self.result.macs_folded),)]


def asked_for(values: dict[str, Any], insisted: bool) -> TrainConfig:
    """The config of these values, with a baseline unless they leave it out, or there can be none.

    Raises:
        UnsupportedError: the user insisted on one where it cannot be trained.

    >>> asked_for({}, False).baseline, asked_for({"baseline": False}, False).baseline
    (True, False)
    >>> asked_for({"method": "plain"}, False).baseline, asked_for({"devices": 2}, False).baseline
    (False, False)
    """
    config = TrainConfig.from_dict({"baseline": True, **values})
    # A run in several processes is the last thing that its program does.
    alone = config.devices == 1 and config.nodes == 1
    if insisted and not alone:
        raise UnsupportedError(
            "baseline: is not trained by several processes; expected one device and one node with it, received "
            f"devices: {config.devices}, nodes: {config.nodes}; train it by itself, with --method plain"
        )
    return dataclasses.replace(config, baseline=config.baseline and config.method != PLAIN and alone)


def train(result: Any, console: Any) -> Baseline:
    """Train the plain network beside a finished run whose config asks for it, or go on where that was cut off.

    A baseline that fails takes nothing from the run: the reason stands below the table.

    Raises:
        KeyboardInterrupt: after Ctrl-C; its text says how to continue.
    """
    from ..train.experiment import fit, resume

    run = RunFolder(result.run)
    config = TrainConfig.load(run.config)
    if not config.baseline:
        return Baseline()
    there = RunFolder(run.baseline)
    console.print("the plain network under the same seed (--no-baseline leaves it out):", highlight=False)
    try:
        with locked(run.path):
            if any(path.is_file() for path in there.checkpoints(config.keep)):
                plain = resume(there.path, console, epochs=config.epochs, patience=config.patience)
            else:
                shutil.rmtree(there.path, ignore_errors=True)  # killed before there was anything to continue from
                plain = fit(of(config, there.path), console)
    except KeyboardInterrupt:
        remedy = "" if config.qat else f"; continue with: foldconv train --resume {shlex.quote(str(run))}"
        raise KeyboardInterrupt(f"stopped while the plain network trained{remedy}") from None
    except FoldConvError as error:
        return Baseline(verdict=f"\n\nplain network: not trained: {error}")
    return Baseline(plain, _verdict(result, plain, run.path))


def of(config: TrainConfig, folder: Path) -> TrainConfig:
    """The config of the plain network beside one that is expanded.

    >>> of(TrainConfig(method="orepa", method_args={"large": "plain"}, seed=3), Path("run/baseline")).run_name
    'digits-digits_resnet-plain'
    """
    of_the_method: dict[str, Any] = {"method_args": {}, "include": None, "exclude": None, "track_branches": False}
    return dataclasses.replace(config, method=PLAIN, **of_the_method, baseline=False, out=str(folder))


def _verdict(result: Any, plain: Any, run: Path) -> str:
    gain = 100 * (result.accuracy_folded - plain.accuracy_folded)
    words = ["foldconv", "compare", "--config", str(run / "config.yaml"), "--seeds", "10", "--out", f"{run}-compared"]
    return (
        f"\nplain network              {plain.run}  (time: {plain.seconds:.1f} s)\n\n"
        f"{result.method}, folded, against plain: {gain:+.2f} points with seed {result.seed}. One seed proves nothing; "
        f"this would tell:\n  {shlex.join(words)}"
    )
