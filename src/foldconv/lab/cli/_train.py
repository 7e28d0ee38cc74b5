"""Train a network with a foldable convolution, fold it, and prove that nothing changed.

Without options: scikit-learn's handwritten digits, a small residual network, DO-Conv. Writes a run folder with the
resolved config, metrics, a checkpoint that resumes, the folded weights and a picture of the curves. Then trains the
plain network under the same seed, in baseline/ of that folder, and shows both (--no-baseline leaves it out).
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any, Literal

from .. import recipes
from ..train.config import Patterns, TrainConfig, over, read_yaml
from . import _baseline
from ._common import Parser, UsageError, add_pairs, pairs

HELP = "train, fold and verify a network"
EXAMPLES = (
    "foldconv train",
    "foldconv train --architecture resnet18 --method doconv --epochs 5 --json",
    "foldconv train --config digits --lr 0.05 --out runs/slow",
    "foldconv train --config list",
    "foldconv train --resume runs/slow",
    "foldconv train --architecture my_nets:Net --data photos --patience 5",
)


CONFIG = "YAML file with options below, which override it, or a recipe's name; list: shows those"
_LIST = "list"
_METAVARS = {"data_folder": "FOLDER", "out": "FOLDER", "pretrained_weights": "ENTRY", "pretrained_prefix": "TEXT"}
"""Of options that take text; the others': NAME. A shell completes what a FOLDER is."""


def add_arguments(parser: Parser) -> None:
    """``--config``, ``--resume``, and one option per field of `TrainConfig`."""
    parser.add_argument("--config", metavar="FILE", help=CONFIG)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue this run folder, with its own config; more --epochs and another --patience may be given",
    )
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups[title], field, hints[field.name])


def _add_option(group: Any, field: dataclasses.Field, hint: Any) -> None:
    """One field of the config as an option of its group."""
    option, help = "--" + field.name.replace("_", "-"), field.metadata["help"].replace("%", "%%")
    kinds = set(typing.get_args(hint)) or {hint}
    if typing.get_origin(hint) is dict:
        add_pairs(typing.cast(Parser, group), option, help)
        return
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help}
    if field.default not in (None, False, True):
        settings["help"] += f" (default: {field.default})"
    if typing.get_origin(hint) is Literal:
        settings["choices"] = typing.get_args(hint)
    elif hint is bool:
        settings["action"] = argparse.BooleanOptionalAction
        default = field.default or field.name == "baseline"
        settings["help"] += f" (default: {'yes' if default else 'no'})"
    elif bool in kinds:  # a switch that may say which or how many
        number = {"type": int, "metavar": "N"} if int in kinds else {"metavar": "CHECKPOINT"}
        settings |= {"nargs": "?", "const": True, **number}
    elif hint == Patterns:
        settings |= {"nargs": "+", "metavar": "PATTERN"}
    else:
        number = next((kind for kind in (int, float) if kind in kinds), str)
        settings["type"] = number
        settings["metavar"] = {int: "N", float: "X"}.get(number, _METAVARS.get(field.name, "NAME"))
    group.add_argument(option, **settings)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Train; the result as plain values and as a table."""
    if options.config == _LIST:
        return {"recipes": recipes.names()}, "\n".join(recipes.names())
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name in options]
    given = {name: getattr(options, name) for name in names}
    given |= {name: pairs(options, name) for name in names if name.endswith("_args")}
    others = [name for name in given if name not in ("epochs", "patience")]
    if options.resume is not None and (others or options.config):
        other = "--config" if options.config else "--" + others[0].replace("_", "-")
        raise UsageError("foldconv train", f"--resume continues with the run's own config, so {other} cannot be given")
    values = over(read_yaml(recipes.find(options.config)) if options.config else {}, given)
    config = _baseline.asked_for(values, insisted=given.get("baseline", False))

    from rich.console import Console

    console = Console(stderr=True)
    with console.status("loading PyTorch and Lightning"):
        from ..train.experiment import fit, resume
    result = resume(options.resume, console, **given) if options.resume is not None else fit(config, console)
    baseline = _baseline.train(result, console)
    return {**dataclasses.asdict(result), "baseline": baseline.values}, _table(result, baseline)


def _table(result: Any, baseline: _baseline.Baseline) -> str:
    from ...network.table import align

    measured = result.accuracy_expanded, result.accuracy_folded
    label = _LABELS.get(result.measure, result.measure)
    rows = [
        (f"{result.architecture} on {result.data}", result.method, "folded"),
        (f"test {label}", *map(_percent, measured)),
        ("parameters", f"{result.parameters_training:,}", f"{result.parameters_folded:,}"),
        ("multiply-adds of one image", _count(result.macs_training), _count(result.macs_folded)),
    ]
    rows = [(*row, *more) for row, more in zip(rows, baseline.column(_count))]
    if result.top5_expanded is not None:
        plain = [] if baseline.result is None else [baseline.result.top5_folded]
        rows.insert(2, ("top-5 accuracy", *map(_percent, [result.top5_expanded, result.top5_folded, *plain])))
    best = ""
    if result.best_epoch != result.epochs and result.best_accuracy is not None:
        chosen = f"{_percent(result.best_accuracy)} {label}, chosen by the test images"
        best = f"best.ckpt                  epoch {result.best_epoch}: {chosen}\n"
    return (
        f"\n{align(rows)}\n\n"
        f"largest output difference  {result.max_output_difference:.1e}\n{best}"
        f"run folder                 {result.run}  (epochs: {result.epochs}, time: {result.seconds:.1f} s)"
        f"{baseline.verdict}"
    )


_LABELS = {"miou": "mIoU", "map": "mAP"}


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"
