"""A picture of how a run went."""

from __future__ import annotations

import os

from matplotlib.figure import Figure

from ...files.atomic import atomic_path


def plot_curves(rows: list[dict[str, float]], path: str | os.PathLike[str], title: str) -> None:
    """Draw loss and accuracy over the epochs into a PNG, without touching the caller's matplotlib state."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axes, name, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("cross-entropy", "share of images")):
        for split, style in (("train", "--"), ("test", "-")):
            axes.plot(epochs, [row[f"{split}_{name}"] for row in rows], style, marker=".", label=split)
        axes.set(xlabel="epoch", ylabel=f"{name} ({unit})")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
