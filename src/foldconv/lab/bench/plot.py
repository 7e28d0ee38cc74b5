"""A picture of how the overhead falls with the work per step."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ...errors import UnsupportedError
from ...files.atomic import atomic_path
from .contestants import AGAIN, PLAIN
from .measure import FORMAT

Point = tuple[float, float, float, float]


def plot(
    paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], network: str | None = None
) -> dict[str, list[Point]]:
    """Draw the ratio of training steps against the work per step (batch × pixels) into a PNG.

    One line per contestant with its interquartile band, and a line at 1, the plain network.

    Args:
        paths: files that ``foldconv bench --out`` wrote; steps of the same network are drawn as one line.
        out: the picture to write.
        network: draw this network's only.

    Returns:
        For each line its points ``(work, median, lower, upper)``.

    Raises:
        UnsupportedError: a file is no such file, or none holds training steps.
        OSError: a file cannot be read or written.
    """
    results = [result for path in paths for result in _read(path) if result["what"] == "step"]
    results = [result for result in results if network in (None, result["network"])]
    if not results:
        names = ", ".join(str(path) for path in paths)
        raise UnsupportedError(f"nothing to draw: no training steps in {names}; measure them with --what step")
    lines = _lines(results)
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes: Any = figure.subplots()
    axes.axhline(1.0, color="black", linewidth=1)
    color_of = {method: f"C{n % 10}" for n, method in enumerate(dict.fromkeys(method for _, method in lines))}
    several = len({network for network, _ in lines}) > 1
    for (network, method), points in lines.items():
        work, median, lower, upper = zip(*points)
        quiet = method == AGAIN
        color = "gray" if quiet else color_of[method]
        label = f"{network}: {method}" if several else method
        axes.plot(work, median, label=label, color=color, marker="." if quiet else "o", linewidth=1 if quiet else 1.8)
        axes.fill_between(work, lower, upper, alpha=0.2, color=color, linewidth=0)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="work per step (batch × pixels of an image)",
        ylabel="time of a training step / the plain network's",
        title=" and ".join(dict.fromkeys(network for network, _ in lines)),
    )
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the curves, not on them
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return {f"{network}: {method}": points for (network, method), points in lines.items()}


def _lines(results: list[dict[str, Any]]) -> dict[tuple[str, str], list[Point]]:
    lines: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for result in results:
        work = float(result["batch"] * result["size"] ** 2)
        for name, ratio in result["ratios"].items():
            if name != PLAIN:
                lines[result["network"], name].append((work, ratio["median"], ratio["lower"], ratio["upper"]))
    return {key: sorted(points) for key, points in lines.items()}


def _read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        try:
            report = json.load(file)
        except ValueError as error:
            raise UnsupportedError(f"{path}: not a file of foldconv bench: no JSON ({error})") from None
    found = report.get("format") if isinstance(report, dict) else None
    if found != FORMAT:
        raise UnsupportedError(f"{path}: not a file of foldconv bench: expected format {FORMAT!r}, received {found!r}")
    return report["results"]
