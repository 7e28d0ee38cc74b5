"""Train several methods with the same seeds, and report which is better, by how much, and how sure that is.

Each run is one process. The same command again goes on where it was stopped; more methods or seeds may then be
given. The first method is the baseline. In --pretrained, {seed} is each run's seed. `foldconv compare report FOLDER`
writes the report again without training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from typing import TYPE_CHECKING, Any

from .. import recipes
from ..compare.config import CompareConfig
from ..train.config import PLAIN, TrainConfig, over, read_yaml
from . import _train
from ._common import Parser, UsageError

if TYPE_CHECKING:
    from ..compare.cluster import ClusterOptions

HELP = "train several methods with the same seeds and report the differences"
EXAMPLES = (
    "foldconv compare --methods plain,doconv,orepa --seeds 10 --out comparison",
    "foldconv compare --methods plain,doconv:depth_multiplier=12 --config digits --epochs 5 --out short",
    "foldconv compare --methods plain,doconv --config digits --out /shared/comparison --ray --gpus-per-run 0.25",
)
_NOT_SHARED = ("help", "config", "resume", "seed", "method", "method_args", "out", "baseline")


def _jobs(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number ≥ 1, received {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, received {text!r}") from None


def add_arguments(parser: Parser) -> None:
    """What is compared, and every option of ``foldconv train`` that all runs can share."""
    suppressed: dict[str, Any] = {"default": argparse.SUPPRESS}
    methods = (
        "methods, the baseline first; options follow a name as in orepa:large=plain (default: plain, and the config's "
        "method or doconv)"
    )
    parser.add_argument("--methods", metavar="NAME,...", help=methods, **suppressed)
    parser.add_argument("--seeds", metavar="N", type=int, help="runs of each method (default: 10)", **suppressed)
    parser.add_argument("--out", metavar="FOLDER", help="new, or one to continue in")
    parser.add_argument("--jobs", metavar="N", type=_jobs, help="runs at once (default: 1)", **suppressed)
    parser.add_argument("--config", metavar="FILE", help=_train.CONFIG, **suppressed)
    parser.add_argument("--seed", metavar="N", type=int, help="the first of the seeds (default: 0)", **suppressed)
    group = parser.add_argument_group("Ray cluster")
    ray = (
        "run on a Ray cluster, as many at once as it holds, --out in a folder that its nodes share; HOST:PORT of its "
        "head (default: the cluster that this machine is in, else one of this machine alone)"
    )
    group.add_argument("--ray", metavar="ADDRESS", nargs="?", const=None, help=ray, **suppressed)
    cpus, gpus = "processors of a run (default: 1)", "GPUs of a run, or a share of one (default: 1 where there are any)"
    group.add_argument("--cpus-per-run", metavar="N", type=_jobs, help=cpus, **suppressed)
    group.add_argument("--gpus-per-run", metavar="SHARE", type=_share, help=gpus, **suppressed)
    train = Parser(add_help=False)
    _train.add_arguments(train)
    for group in train._action_groups:
        shared = [action for action in group._group_actions if action.dest not in _NOT_SHARED]
        if shared:
            copy = parser.add_argument_group(f"{group.title}, the same for all runs")
            for action in shared:
                copy._add_action(action)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Train what is missing and report; as plain values and as tables."""
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name in options and field.name != "out"]
    if options.out is None:
        raise UsageError("foldconv compare", "the following arguments are required: --out FOLDER")
    hints = typing.get_type_hints(TrainConfig)
    given = {name: getattr(options, name) for name in names}
    given |= {name: dict(value) for name, value in given.items() if typing.get_origin(hints[name]) is dict}
    from_file = read_yaml(recipes.find(options.config)) if "config" in options else {}
    recipe = TrainConfig.from_dict(over(from_file, given))
    chosen: dict[str, Any] = {"seeds": options.seeds} if "seeds" in options else {}
    methods = _methods(getattr(options, "methods", None), recipe)
    config = CompareConfig(methods, train=dataclasses.replace(recipe, method_args={}), **chosen)

    from ..compare.runner import compare

    values, failures = compare(config, options.out, getattr(options, "jobs", 1), cluster=_cluster(options))
    if failures:
        from ...errors import FoldConvError

        print(json.dumps(values, indent=2) if options.json else as_text(values, options.out), flush=True)
        raise FoldConvError(f"{len(failures)} runs failed ({_causes(failures)}); the same command tries them again")
    return values, as_text(values, options.out)


def _cluster(options: argparse.Namespace) -> ClusterOptions | None:
    if "ray" not in options:
        for name in ("cpus_per_run", "gpus_per_run"):
            if name in options:
                raise UsageError("foldconv compare", f"--{name.replace('_', '-')}: with --ray only")
        return None
    if "jobs" in options:
        raise UsageError("foldconv compare", "--jobs: not with --ray; give what a run takes, with --cpus-per-run")
    from ..compare.cluster import ClusterOptions

    return ClusterOptions(options.ray, getattr(options, "cpus_per_run", 1), getattr(options, "gpus_per_run", None))


def _methods(given: str | None, recipe: TrainConfig) -> tuple[str, ...]:
    """The methods to compare. A recipe's options are those of its own method, wherever that is named without any.

    >>> recipe = TrainConfig(method="expandnet", method_args={"chain": "CK"})
    >>> _methods("plain,expandnet,doconv", recipe), _methods(None, recipe)
    (('plain', 'expandnet:chain=CK', 'doconv'), ('plain', 'expandnet:chain=CK'))
    """
    own = recipe.method
    words = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in recipe.method_args.items()]
    names = [word.strip() for word in given.split(",")] if given else [PLAIN, *[own] * (own != PLAIN)]
    return tuple(":".join([name, *words]) if name == own else name for name in names)


def _causes(failures: dict[str, str]) -> str:
    """Each cause once, since a wrong option fails with every seed.

    >>> _causes({"a/seed-0": "no memory", "a/seed-1": "no memory", "b/seed-0": "diverged"})
    'a/seed-0 and 1 more: no memory; b/seed-0: diverged'
    """
    runs: dict[str, list[str]] = {}
    for name, error in failures.items():
        runs.setdefault(error, []).append(name)
    more = {error: f" and {len(names) - 1} more" if names[1:] else "" for error, names in runs.items()}
    return "; ".join(f"{names[0]}{more[error]}: {error}" for error, names in runs.items())


def as_text(values: dict[str, Any], folder: str) -> str:
    """The report's title and its tables."""
    from ..compare.markdown import accuracy_table, cost_table

    head = values["title"]
    if values["runs_finished"] < values["runs_total"]:
        head += f" ({values['runs_finished']} of {values['runs_total']} runs)"
    if values["runs_at_once"] > 1:
        head += f"; {values['runs_at_once']} runs at once, which times tell of"
    return f"\n{head}\n\n{accuracy_table(values)}\n\n{cost_table(values)}\n\n{folder}/report.md: written"
