"""Write docs/fold-errors.md: how far each method's folds are from its layers, over the sweep of `foldconv.testing`.

    python docs/fold_errors.py

Each convolution of the sweep is expanded, its parameters and norm statistics drawn at random, and folded. The layer
runs by its features, the fold as a plain convolution, both in the named type; errors are relative to the largest
output.
"""

import platform
from pathlib import Path

import torch

import foldconv
from foldconv.network.tree import foldable_layers
from foldconv.testing import cases, randomize

HEAD = """# Fold errors

The largest difference between a layer and its fold, relative to the largest output, over the convolutions of
`foldconv.testing.cases` (1-d to 3-d, strides, dilations, groups, even and rectangular kernels, every padding mode,
transposed where the method applies), with random parameters and norm statistics. Written by
`python docs/fold_errors.py`.

| method | convolutions | float64 | float32 |
|---|---|---|---|
"""


@torch.no_grad()
def largest_error(method, dtype):
    """Over all cases of a method: the largest relative difference between features and fold."""
    worst = 0.0
    for case in cases(method):
        rich = foldconv.expand(case.network(), method)
        randomize(rich)
        rich, x = rich.to(dtype), case.input().to(dtype)
        (layer,) = foldable_layers(rich).values()
        expected, received = layer.feature_forward(x), layer.fold()(x)
        worst = max(worst, ((expected - received).abs().max() / expected.abs().max()).item())
    return worst


def table():
    rows = []
    for name in foldconv.list_methods():
        torch.manual_seed(0)
        method = foldconv.get_method(name)()
        errors = " | ".join(f"{largest_error(method, dtype):.1e}" for dtype in (torch.float64, torch.float32))
        rows.append(f"| `{name}` | {len(cases(method))} | {errors} |")
    machine = f"\nMeasured with torch {torch.__version__.split('+')[0]} on {platform.machine()} (CPU), seed 0.\n"
    return HEAD + "\n".join(rows) + "\n" + machine


if __name__ == "__main__":
    Path(__file__).with_name("fold-errors.md").write_text(table(), encoding="utf-8")
