"""`report`: what the finished runs of a comparison say, as plain values, text, a table and two pictures."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from ...files.atomic import atomic_path, write_json
from ..machine import portable
from ..run import write_rows
from ..train.config import TrainConfig
from .config import FORMAT, CompareConfig
from .results import Outcome, curve, outcomes, read_json
from .statistics import PairedDifference, paired_difference, seeds_to_resolve

MACHINES = "machines.json"
CONFIDENCE = 0.95
_COSTS = ("parameters_training", "parameters_folded", "macs_training", "macs_folded")
_COLUMNS = ("data", "architecture", "epochs", "accuracy_folded", "accuracy_expanded", "max_output_difference", *_COSTS)


def report(root: str | os.PathLike[str]) -> dict[str, Any]:
    """Write report.json, report.md, results.csv, curves.png and differences.png from the runs that are finished.

    Args:
        root: the folder of a comparison; nothing is trained.

    Returns:
        What report.json holds: plain values. Accuracies are of the folded networks after the last epoch, in percent
        of the test images; differences in percentage points; times in seconds; memory in bytes.

    Raises:
        UnsupportedError: not such a folder, or no run in it is finished.
    """
    from .markdown import markdown
    from .pictures import plot_curves, plot_differences

    root = Path(root)
    config = CompareConfig.load(root)
    found = outcomes(config, root)
    if not found:
        raise UnsupportedError(f"{root}: nothing to report: none of {len(config.jobs(root))} runs has ended well")
    values = summarize(config, found)
    values["machines"] = read_json(root / MACHINES).get("machines", [])
    values["command"] = command(config, str(root))
    curves = {m: [curve(outcome.job) for outcome in found if outcome.job.method == m] for m in config.methods}
    plot_curves(curves, root / "curves.png", values["title"])
    plot_differences(values, root / "differences.png")
    _write_csv(found, root / "results.csv")
    write_json(root / "report.json", values, indent=1)
    with atomic_path(root / "report.md") as temporary:
        temporary.write_text(markdown(values), encoding="utf-8")
    return values


def summarize(config: CompareConfig, found: Sequence[Outcome]) -> dict[str, Any]:
    """Accuracies, paired differences to the first method, times, memory and costs, as plain values.

    Args:
        config: what was compared.
        found: the finished runs; seeds that one method lacks are left out where it is compared.
    """
    by_method = {m: {o.job.seed: o for o in found if o.job.method == m} for m in config.methods}
    baseline = by_method[config.methods[0]]
    differences = {
        method: paired_difference(*pairs, CONFIDENCE)
        for method, runs in list(by_method.items())[1:]
        if len((pairs := _paired(baseline, runs))[0]) > 1
    }
    confirmed = holm({method: _paired(baseline, by_method[method]) for method in differences})
    methods = {}
    for method, runs in by_method.items():
        accuracies = [outcome.accuracy for outcome in runs.values()]
        methods[method] = {
            "accuracies": {str(seed): round(outcome.accuracy, 6) for seed, outcome in runs.items()},
            "mean": statistics.fmean(accuracies) if accuracies else None,
            "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "difference": _difference(differences.get(method), method in confirmed),
            "training_seconds": _cost(baseline, runs, "training_seconds"),
            "peak_memory": _cost(baseline, runs, "peak_memory"),
            **{name: next((outcome.result.get(name) for outcome in runs.values()), None) for name in _COSTS},
            "largest_output_difference": max(
                (o.result.get("max_output_difference", 0.0) for o in runs.values()), default=None
            ),
        }
    seeds = [job.seed for job in config.jobs("") if job.method == config.methods[0]]
    train = config.train
    extent = f"{_counted(train.epochs, 'epoch')}, {_counted(config.seeds, 'seed')}"
    return {
        "format": FORMAT,
        "title": f"{train.architecture} on {train.data}, {extent}",
        "baseline": config.methods[0],
        "seeds": seeds,
        "confidence": CONFIDENCE,
        "runs_finished": len(found),
        "runs_total": len(seeds) * len(config.methods),
        "runs_at_once": max(outcome.parallel for outcome in found),
        "runs_continued": sum(outcome.starts > 1 for outcome in found),
        "time_is_of": "training epochs" if all("training_seconds" in o.result for o in found) else "whole runs",
        "devices": sorted({str(outcome.result["device"]) for outcome in found if outcome.result.get("device")}),
        "methods": methods,
        "config": {k: portable(v) if isinstance(v, str) else v for k, v in config.shared().items()},
    }


def holm(pairs: dict[str, tuple[list[float], list[float]]], confidence: float = CONFIDENCE) -> set[str]:
    """The methods whose difference has a known sign, so that all such statements are right at once (Holm's rule).

    The method that is clearest must be so at the strictest level, as if it were one of all; the next as if it were
    one of the rest; and so on until one is not.

    Args:
        pairs: for each method the baseline's values and its own, of the same seeds.
        confidence: with which all statements together are right.

    >>> holm({"a": ([1, 1, 1], [2, 2.1, 1.9]), "b": ([1, 1, 1], [0, 2, 1])})
    {'a'}
    """
    confirmed: set[str] = set()
    while rest := [method for method in pairs if method not in confirmed]:
        level = 1 - (1 - confidence) / len(rest)
        new = [method for method in rest if paired_difference(*pairs[method], level).resolved]
        if not new:
            break
        confirmed.update(new)
    return confirmed


def command(config: CompareConfig, root: str) -> str:
    """The command line that makes this comparison; paths are relative, since absolute ones are of no use to others."""
    words = ["foldconv", "compare", "--methods", ",".join(config.methods), "--seeds", str(config.seeds)]
    defaults = TrainConfig()
    for name, value in config.shared().items():
        if value == getattr(defaults, name):
            continue
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            words += [option, *(f"{key}={json.dumps(each)}" for key, each in value.items())]
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        else:
            words += [option, portable(str(value))]
    return shlex.join([*words, "--out", portable(root)])


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _paired(baseline: dict[int, Outcome], runs: dict[int, Outcome]) -> tuple[list[float], list[float]]:
    seeds = [seed for seed in baseline if seed in runs]
    return [baseline[seed].accuracy for seed in seeds], [runs[seed].accuracy for seed in seeds]


def _difference(found: PairedDifference | None, confirmed: bool) -> dict[str, Any] | None:
    if found is None:
        return None
    # Shares of images that cancel leave 1e-14 of a point, which no number of seeds would resolve.
    seeds = seeds_to_resolve(found.mean, found.std) if abs(found.mean) > 1e-9 else None
    return {
        **dataclasses.asdict(found),
        "resolved": found.resolved,
        "resolved_among_all": confirmed,
        "seeds_to_resolve": seeds,
    }


def _cost(baseline: dict[int, Outcome], runs: dict[int, Outcome], name: str) -> dict[str, Any] | None:
    """The median of what is measured, and of its ratio to the baseline's run with the same seed."""
    measured = {seed: value for seed, o in runs.items() if (value := getattr(o, name)) is not None}
    if not measured:
        return None
    base = {seed: getattr(baseline[seed], name) for seed in measured if seed in baseline}
    ratios = [value / base[seed] for seed, value in measured.items() if base.get(seed)]
    return {
        "median": statistics.median(measured.values()),
        "ratio": statistics.median(ratios) if ratios else None,
        "lowest_ratio": min(ratios, default=None),
        "highest_ratio": max(ratios, default=None),
        "runs": len(measured),
    }


def _write_csv(found: Sequence[Outcome], path: Path) -> None:
    own = ("method", "seed", "training_seconds", "wall_seconds", "peak_memory", "starts", "runs_at_once")
    rows = [
        {name: outcome.result.get(name) for name in (*_COLUMNS, "training_seconds", "peak_memory", "device")}
        | {"method": outcome.job.method, "seed": outcome.job.seed, "wall_seconds": outcome.wall_seconds}
        | {"starts": outcome.starts, "runs_at_once": outcome.parallel}
        for outcome in found
    ]
    write_rows(path, [*own[:2], *_COLUMNS, *own[2:], "device"], rows)
