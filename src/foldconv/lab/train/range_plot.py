"""A picture of a network's ranges, as int8 will meet them: each layer's channels, relative to the median one."""

from __future__ import annotations

import os
from typing import Any

from matplotlib.figure import Figure

from ...deploy.ranges import HEAVY, STEPS, RangeReport
from ...files.atomic import atomic_path

_COLOURS = ("#0072B2", "#D55E00")  # Okabe and Ito's


def plot_ranges(report: RangeReport, path: str | os.PathLike[str], title: str) -> None:
    """Draw into a PNG one point for each channel: weights on the left, activations on the right, a row for each layer.

    The axis at the bottom is the range relative to the median channel, the one at the top how many of int8's steps a
    channel gets that is so much smaller than the heaviest. Beyond the dashed line a channel is heavy.

    Args:
        report: of `foldconv.range_report`.
        path: the picture to write; an existing file is not replaced.
        title: its headline.

    Raises:
        FileExistsError: the file exists.
    """
    layers = report.layers
    figure = Figure(figsize=(13.0, max(4.0, 1.8 + 0.24 * len(layers))), layout="constrained")
    for axes, what, colour in zip(figure.subplots(1, 2, sharey=True), ("weights", "activations"), _COLOURS):
        _points(axes, [getattr(each, what) for each in layers], colour)
        axes.set(title=what, xlabel="largest absolute value of each channel, relative to the median channel's")
        axes.set_yticks(range(len(layers)), [each.name or "(root)" for each in layers], fontsize="small")
    axes = figure.axes[0]
    axes.invert_yaxis()
    figure.suptitle(title)
    with atomic_path(path, overwrite=False) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _points(axes: Any, rows: list[Any], colour: str) -> None:
    for y, ranges in enumerate(rows):
        if ranges is not None:
            ratios = [ratio for ratio in ranges.ratios if ratio > 0]  # a logarithmic axis has no zero
            axes.plot(ratios, [y] * len(ratios), "|", color=colour, markersize=7, alpha=0.6)
            if ranges.ratio >= HEAVY:
                place = {"textcoords": "offset points", "ha": "right", "va": "center", "fontsize": "x-small"}
                axes.annotate(f"channel {ranges.heaviest}", (ranges.ratio, y), (-6, 0), **place)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:.3g}")
    axes.axvline(HEAVY, color="0.4", linestyle="--", linewidth=0.9)
    axes.axvline(1, color="0.4", linewidth=0.6)
    axes.grid(alpha=0.3, axis="y")
    top = axes.secondary_xaxis("top", functions=(lambda ratio: ratio, lambda ratio: ratio))
    top.set_xscale("log", base=2)
    top.set_xlabel(f"the median channel's steps of {STEPS}, if this is the heaviest", fontsize="small")
    top.xaxis.set_major_formatter(lambda ratio, _: f"{STEPS / ratio:.3g}" if ratio >= 1 else "")
