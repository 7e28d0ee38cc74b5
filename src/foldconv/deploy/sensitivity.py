"""How much the output changes when one layer alone is computed in int8, simulated in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..algebra.convolutions import PLAIN
from ..network.tree import copy_of


def quantizable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """What has weights that int8 is for, by name: convolutions and linear layers.

    Example:
        >>> list(quantizable_layers(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(2, 2))))
        ['0', '2']
    """
    return {name: module for name, module in network.named_modules() if isinstance(module, (*PLAIN, nn.Linear))}


@torch.no_grad()
def sensitivities(
    network: nn.Module, inputs: Sequence[Tensor], *, per_channel: bool = True, names: Sequence[str] | None = None
) -> dict[str, float]:
    """For each layer the error of the output when only its weight and its input are rounded to int8.

    The scale is the largest magnitude by 127 for weights, of each output channel or of all, and the range of all values
    by 255 for inputs: what runtimes do, without their own further rounding.

    Args:
        network: plain, in evaluation mode; it is not touched.
        inputs: tensors that it is called with, the samples to measure with.
        per_channel: whether each output channel of a weight has a scale.
        names: of the layers to measure; None: all.

    Returns:
        Error by name, relative: the norm of the difference by the norm of the output; the largest first.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
        >>> _ = net[0].weight.data[0].mul_(1000), net[2].weight.data[:, 0].div_(1000)
        >>> list(sensitivities(net, (torch.randn(4, 3, 8, 8),)))  # what reads the large channel
        ['2', '0']
    """
    network = copy_of(network)
    layers = quantizable_layers(network)
    exact = _output(network, inputs)
    found: dict[str, float] = {}
    for name in layers if names is None else names:
        layer: Any = layers[name]
        weight = layer.weight.detach().clone()
        hook = layer.register_forward_pre_hook(lambda _, args: (_rounded(args[0]), *args[1:]))
        try:
            layer.weight.copy_(rounded_weight(layer, per_channel))
            found[name] = float((_output(network, inputs) - exact).norm() / exact.norm().clamp_min(1e-30))
        finally:
            hook.remove()
            layer.weight.copy_(weight)
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def rounded_weight(layer: Any, per_channel: bool) -> Tensor:
    """A layer's weight rounded to 255 levels, on a scale of each output channel or of all."""
    weight = layer.weight.detach()
    if not per_channel:
        scale = weight.abs().max() / 127
    elif getattr(layer, "transposed", False):  # (in, out / groups, taps)
        grouped = weight.unflatten(0, (layer.groups, -1))
        scale = grouped.abs().amax((1, *range(3, grouped.dim())), keepdim=True) / 127
        return (grouped / scale.clamp_min(1e-30)).round().mul(scale).flatten(0, 1)
    else:
        scale = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True) / 127
    scale = scale.clamp_min(1e-30)
    return (weight / scale).round() * scale


def _rounded(x: Tensor) -> Tensor:
    low, high = x.min().clamp_max(0), x.max().clamp_min(0)
    scale = (high - low).clamp_min(1e-30) / 255
    return ((x - low) / scale).round() * scale + low


def _output(network: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    values = [value.double().flatten() for value in tree_leaves(network(*inputs)) if isinstance(value, Tensor)]
    return torch.cat(values)
