"""Two pictures of a comparison: accuracy over the epochs, and paired differences with their intervals."""

from __future__ import annotations

import os
import statistics
from typing import Any

from matplotlib.figure import Figure

from ...files.atomic import atomic_path
from .results import Curve

# Okabe and Ito's colours, told apart with any kind of colour vision; the baseline is black. Yellow is left out, since
# it is pale on white. Line styles tell the rest apart, and both in print.
_BASELINE = "#000000"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_STYLES = ("-", "--", "-.", ":")


def plot_curves(curves: dict[str, list[Curve]], path: str | os.PathLike[str], title: str) -> None:
    """Draw the mean test accuracy over the epochs into a PNG, with a band of one standard deviation over the seeds.

    Args:
        curves: for each method its runs' epochs and accuracies in percent; epochs that not all of its runs have
            are left out.
        path: the picture to write.
        title: above it.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    late: list[float] = []
    for number, (method, runs) in enumerate(curves.items()):
        tables = [dict(run) for run in runs if run]
        if not tables:
            continue
        epochs = sorted(set.intersection(*(set(each) for each in tables)))
        columns = [[each[epoch] for each in tables] for epoch in epochs]
        means = [statistics.fmean(column) for column in columns]
        spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
        late += means[len(means) // 4 :]
        colour, style = _colour(number), _STYLES[number % len(_STYLES)]
        marker = "." if len(epochs) < 40 else None
        axes.plot(epochs, means, style, color=colour, label=method, marker=marker, linewidth=1.5)
        low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)
    # Early epochs, and single runs that stumbled, must not press the late ones, which are judged, into a line.
    if late:
        margin = 0.1 * (max(late) - min(late)) + 0.1
        axes.set_ylim(min(late) - margin, min(100.5, max(late) + margin))
    axes.set(xlabel="epoch", ylabel="test accuracy (%), mean ± std over the seeds", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    _save(figure, path)


def plot_differences(values: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw each method's differences to the baseline into a PNG: a dot per seed, the mean with its 95 % interval.

    Args:
        values: what `reporting.summarize` returned.
        path: the picture to write.
    """
    base = values["methods"][values["baseline"]]["accuracies"]
    names = [name for name in values["methods"] if name != values["baseline"]]
    figure = Figure(figsize=(8, 1.5 + 0.6 * max(1, len(names))), layout="constrained")
    axes: Any = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    for row, name in enumerate(names):
        method, colour = values["methods"][name], _colour(row + 1)
        dots = [value - base[seed] for seed, value in method["accuracies"].items() if seed in base]
        axes.plot(dots, [row + 0.18] * len(dots), "o", color=colour, alpha=0.45, markersize=4, markeredgewidth=0)
        if found := method["difference"]:
            axes.plot([found["low"], found["high"]], [row, row], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot(found["mean"], row, "D", color=colour, markersize=7)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(
        xlabel=f"accuracy minus that of {values['baseline']} with the same seed (percentage points)",
        title=f"{values['title']}\nmean with 95 % interval, and each seed",
    )
    axes.title.set_fontsize("medium")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _colour(number: int) -> str:
    return _COLOURS[(number - 1) % len(_COLOURS)] if number else _BASELINE


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", pil_kwargs={"optimize": True})
