"""Which path the layers of a network take when they compose their kernels."""

from __future__ import annotations

from torch import nn

from .. import ops
from ..layers import ComposedConv, Foldable
from .tree import expect_module


def explain(module: nn.Module) -> str:
    """Which path of `foldconv.ops` each foldable layer in `module` takes now, and why: one line per layer.

    Args:
        module: a network or a layer.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
        >>> print(explain(foldconv.expand(net, "repvgg")))
        0: features: its branches run side by side, for their norms see the batch
        >>> with ops.using("torch"):
        ...     print(explain(foldconv.expand(net, "doconv")))
        0: torch: asked for by foldconv.ops.using
    """
    expect_module(module)
    lines = {name: path_of(m) for name, m in module.named_modules() if isinstance(m, Foldable)}
    return "\n".join(f"{name}: {line}" if name else line for name, line in lines.items())


def path_of(layer: Foldable) -> str:
    """The path of one layer, a colon and the reason."""
    if not isinstance(layer, ComposedConv):
        return "features: its branches run side by side, for their norms see the batch"
    tensors = layer.composition_tensors()
    return "torch: its composition is made of what torch computes well" if tensors is None else ops.why(*tensors)
