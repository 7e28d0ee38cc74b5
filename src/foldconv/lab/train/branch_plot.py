"""Pictures of what the branches of a network do: of one checkpoint, or over a training run."""

from __future__ import annotations

import math
import os
from typing import Any

from matplotlib.figure import Figure

from ...files.atomic import atomic_path
from ...network.branches import BranchReport, LayerBranches
from .branch_table import Row

# Okabe and Ito's colours, told apart with every kind of colour vision; markers and dashes tell branches apart in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
_MARKERS, _DASHES = "osv^Dx+*", ("-", "--", "-.", ":")
_MANY = 40
"""From this number of layers on, a heat map's cells are too small for numbers."""
_IN_LEGEND = 20
"""From this number of layers on, a legend names only some of them."""


def plot_branches(report: BranchReport, path: str | os.PathLike[str], title: str, history: list[Row] | None = None):
    """Draw into a PNG what the report holds, and its course over the epochs where there is a history.

    Shares are a heat map of layers and branches (purple: part of the kernel, orange: against it), similarities and D's
    distance from the identity are bars per layer or, with a history, lines over the epochs. Learned groups are bars
    with their number, on an axis of powers of two, before an outline of the most that the layer could learn (as the
    figure of the DGConv paper, with the layers from top to bottom); with a history also lines over the epochs.

    Args:
        report: the state that is drawn layer by layer.
        path: the picture to write; an existing file is not replaced.
        title: its headline.
        history: rows of branches.csv.

    Returns:
        The names of the panels, in the order in which they stand.

    Raises:
        FileExistsError: the file exists.
    """
    layers = report.layers
    several = [layer for layer in layers if len(layer.branches) > 1]
    panels: list[tuple[str, Any]] = []
    if several:
        panels.append(("shares", lambda axes: _heat_map(axes, several)))
    if several and history:
        panels.append(("shares over epochs", lambda axes: _shares(axes, history)))
    for column, label in (("similarity", "mean cosine of branches"), ("identity_distance", "‖D - I‖ / ‖I‖")):
        if any(getattr(layer, column) is not None for layer in several):
            if history:
                panels.append((f"{column} over epochs", lambda axes, c=column, t=label: _course(axes, history, c, t)))
            else:
                panels.append((column, lambda axes, c=column, t=label: _bars(axes, several, c, t)))
    grouped = [layer for layer in layers if layer.groups is not None]
    if grouped:
        panels.append(("groups", lambda axes: _groups(axes, grouped)))
    if grouped and history:
        panels.append(("groups over epochs", lambda axes: _groups_course(axes, history)))
    if not panels:  # chains: one branch of share one everywhere
        panels.append(("shares", lambda axes: _heat_map(axes, list(layers))))
    height = max(4.0, 1.5 + 0.24 * len(layers))
    figure = Figure(figsize=(6.0 * len(panels), height), layout="constrained")
    for axes, (_, draw) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw(axes)
    figure.suptitle(title)
    with atomic_path(path, overwrite=False) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return [name for name, _ in panels]


def _heat_map(axes: Any, layers: list[LayerBranches]) -> None:
    names = list(dict.fromkeys(branch.name for layer in layers for branch in layer.branches))
    cells = [[math.nan] * len(names) for _ in layers]
    for row, layer in zip(cells, layers):
        for branch in layer.branches:
            row[names.index(branch.name)] = math.nan if branch.share is None else branch.share
    image = axes.imshow(cells, aspect="auto", cmap="PuOr", vmin=-1, vmax=1)
    axes.set_facecolor("0.85")  # no such branch, or a kernel of zeros
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), [layer.name or "(root)" for layer in layers], fontsize="small")
    if len(layers) <= _MANY:
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    colour = "white" if abs(value) > 0.6 else "black"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize="x-small")
    axes.figure.colorbar(image, ax=axes, label="share of the folded kernel", extend="both", shrink=0.8)
    axes.set_title("shares by layer")


def _shares(axes: Any, history: list[Row]) -> None:
    """One line per branch: its share, averaged over the layers that have it."""
    for n, (name, (epochs, values)) in enumerate(_lines(history, "branch", "share").items()):
        style = {"marker": _MARKERS[n % 8], "linestyle": _DASHES[n % 4], "color": _COLOURS[n % 8]}
        axes.plot(epochs, values, label=name, markersize=4, **style)
    axes.axhline(0, color="black", linewidth=0.6)
    _over_epochs(axes, "share, mean over layers", "shares over training")


def _course(axes: Any, history: list[Row], column: str, label: str) -> None:
    """One line per layer, dark for the first and bright for the last."""
    from matplotlib import colormaps

    lines = _lines(history, "layer", column)
    last = len(lines) - 1
    named = range(len(lines)) if last < _IN_LEGEND else {0, last // 3, 2 * last // 3, last}
    for n, (name, (epochs, values)) in enumerate(lines.items()):
        # Up to 0.9: the brightest yellow is lost on white.
        style = {"color": colormaps["viridis"](0.9 * n / max(last, 1)), "linestyle": _DASHES[n % 4], "marker": "."}
        axes.plot(epochs, values, label=(name or "(root)") if n in named else None, **style)
    _over_epochs(axes, label, f"{label} over training")


def _lines(history: list[Row], key: str, column: str) -> dict[str, tuple[list[int], list[float]]]:
    """For each branch or layer that has the value: epochs, and the mean over what else the rows tell apart."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in history:
        if row[column] is not None:
            found.setdefault(row[key], {}).setdefault(row["epoch"], []).append(row[column])
    return {
        name: (list(by_epoch), [sum(values) / len(values) for values in by_epoch.values()])
        for name, by_epoch in found.items()
    }


def _over_epochs(axes: Any, label: str, title: str) -> None:
    axes.set(xlabel="epoch", ylabel=label, title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the lines, not on them


def _bars(axes: Any, layers: list[LayerBranches], column: str, label: str) -> None:
    axes.barh(range(len(layers)), [getattr(layer, column) or 0.0 for layer in layers], color=_COLOURS[0])
    _by_layer(axes, layers, label)


def _groups(axes: Any, layers: list[LayerBranches]) -> None:
    places = range(len(layers))
    most = [len(layer.gates or ()) for layer in layers]  # a gate for each halving of the channels
    learned = [math.log2(layer.groups or 1) for layer in layers]
    axes.barh(places, most, color="none", edgecolor="0.7", label="possible")
    axes.barh(places, learned, color=_COLOURS[1], label="learned")
    for y, (x, layer) in enumerate(zip(learned, layers)):
        axes.annotate(str(layer.groups), (x, y), (3, 0), textcoords="offset points", va="center", fontsize="x-small")
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _by_layer(axes, layers, "groups")
    _powers_of_two(axes.xaxis)


def _groups_course(axes: Any, history: list[Row]) -> None:
    """One line per layer; a logarithmic axis, as gates double and halve."""
    logarithms = [{**row, "groups": math.log2(row["groups"])} for row in history if row["groups"]]
    _course(axes, logarithms, "groups", "groups")
    _powers_of_two(axes.yaxis)


def _powers_of_two(axis: Any) -> None:
    axis.get_major_locator().set_params(integer=True)
    axis.set_major_formatter(lambda value, _: f"{2**value:g}")


def _by_layer(axes: Any, layers: list[LayerBranches], label: str) -> None:
    axes.set_yticks(range(len(layers)), [layer.name or "(root)" for layer in layers], fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel=label, title=f"{label} by layer")
    axes.grid(alpha=0.3, axis="x")
