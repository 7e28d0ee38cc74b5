"""A picture of how a run went."""

from __future__ import annotations

import os

from matplotlib.figure import Figure

from ...files.atomic import atomic_path


def plot_curves(
    rows: list[dict[str, float]],
    path: str | os.PathLike[str],
    title: str,
    measure: tuple[str, str] = ("accuracy", "share of images"),
) -> None:
    """Draw loss and measure over the epochs into a PNG, without touching the caller's matplotlib state.

    Args:
        rows: of metrics.csv.
        path: of the PNG.
        title: above it.
        measure: what is beside the loss, as the rows name it, and its unit.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axes, name, unit in zip(figure.subplots(1, 2), ("loss", measure[0]), ("mean of the images", measure[1])):
        for split, style in (("train", "--"), ("test", "-")):
            if f"{split}_{name}" in rows[0]:
                axes.plot(epochs, [row[f"{split}_{name}"] for row in rows], style, marker=".", label=split)
        axes.set(xlabel="epoch", ylabel=f"{name} ({unit})")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
