"""What an optimizer needs to know: which parameters decay, and the methods' own penalties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import expect_number
from ..layers import Foldable
from .tree import unwrapped

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups with each parameter's right decay.

    Kernels and what they are composed from decay; biases, norms, per-channel scales and structure gates do not.
    Frozen parameters are left out, shared ones come once.

    Args:
        model: plain or expanded.
        weight_decay: the decay of the parameters that have one.

    Returns:
        One or two groups, each with ``params`` and ``weight_decay``.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> groups = foldconv.parameter_groups(foldconv.expand(net, "doconv"), 1e-4)
        >>> [(len(g["params"]), g["weight_decay"]) for g in groups]
        [(2, 0.0001), (3, 0.0)]
    """
    expect_number("weight_decay", weight_decay, 0)
    model = unwrapped(model)
    exempt = {
        id(parameter)
        for layer in _foldable(model)
        for name, parameter in layer.named_parameters(recurse=False)
        if name in layer.no_decay
    }
    exempt |= {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters()}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.endswith("bias") or id(parameter) in exempt
            (kept if free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _foldable(model: nn.Module) -> list[Foldable]:
    """Every foldable layer, those inside the branches of others too."""
    return [module for module in unwrapped(model).modules() if isinstance(module, Foldable)]


def regularization(model: nn.Module) -> Tensor:
    """The sum of the methods' own penalties, a scalar to add to the loss (zero for methods without one).

    Example:
        >>> import foldconv
        >>> foldconv.regularization(foldconv.expand(nn.Conv2d(1, 1, 3), "doconv"))
        tensor(0.)
    """
    penalties = [layer.regularization() for layer in _foldable(model)]
    present = [penalty for penalty in penalties if penalty is not None]
    if present:
        return torch.stack(present).sum()
    device = next((p.device for p in model.parameters()), None)
    return torch.zeros((), device=device)
