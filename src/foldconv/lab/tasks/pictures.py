"""Pictures of predictions in a grid."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from ...files.atomic import atomic_path


def write_grid(
    rows: Sequence[Sequence[Tensor]], heads: Sequence[str], path: str | os.PathLike[str], overwrite: bool = True
) -> None:
    """Images (uint8, 3×H×W) in rows under their heads, as a PNG."""
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    height, width = rows[0][0].shape[1:]
    figure = Figure(figsize=(3 * columns, 3 * len(rows) * height / width + 0.3), layout="constrained")
    for row, line in zip(rows, figure.subplots(len(rows), columns, squeeze=False)):
        for axes in line:
            axes.axis("off")
        for image, axes in zip(row, line):
            axes.imshow(image.permute(1, 2, 0).numpy())
            if row is rows[0] and heads:
                axes.set_title(heads[list(line).index(axes)], fontsize=9)
    with atomic_path(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
