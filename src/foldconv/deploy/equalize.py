"""`equalize`: ranges of channels become alike, the function stays; for what is quantized with one scale per tensor.

An activation f with f(s·x) = s·f(x) for s > 0 lets a channel be made smaller before it and larger behind it:

    W⁽²⁾ f(W⁽¹⁾ x + b) = (W⁽²⁾ S) f(S⁻¹ W⁽¹⁾ x + S⁻¹ b),    sᵢ = √(r⁽¹⁾ᵢ / r⁽²⁾ᵢ)

with r⁽¹⁾ᵢ the largest weight of output channel i before, r⁽²⁾ᵢ that of input channel i behind: then both are √(r⁽¹⁾ᵢ r⁽²⁾ᵢ).
M. Nagel, M. van Baalen, T. Blankevoort, M. Welling: Data-free quantization through weight equalization and bias
correction, ICCV 2019, equations 7 to 11. Their absorption of biases is left out: at padded borders it changes the function.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..algebra.convolutions import PLAIN
from ..errors import FoldMismatchError, UnsupportedError
from ..layers import Foldable
from ..layers.foldable import is_altered
from ..network._outputs import difference
from ..network._tracing import Trace
from ..network._watching import arguments_of
from ..network.dataflow import DataFlow
from ..network.table import some
from ..network.tree import copy_of

_LOG = logging.getLogger(__name__)
TOLERANCE = 1e-10
"""Largest difference in float64, relative to the output's largest value."""
_ROUNDS = 50
_POOLS = ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "Dropout")
_HOMOGENEOUS = (
    *(nn.Identity, nn.Dropout, nn.ReLU, nn.LeakyReLU, nn.PReLU),
    *(getattr(nn, f"{name}{n}d") for name in _POOLS for n in (1, 2, 3)),
)
"""Modules with f(s·x) = s·f(x) for each channel and s > 0."""
_FUNCTIONS = (F.relu, F.leaky_relu, F.dropout, torch.relu, torch.relu_)
_METHODS = ("relu", "relu_", "contiguous", "clone")
_CLIPPED = (nn.ReLU6, nn.Hardtanh, nn.Hardswish, F.relu6, F.hardtanh)


def equalize(model: nn.Module, example_inputs: Any = None, *, inplace: bool = False) -> nn.Module:
    """The model with channels of like ranges, in the weights and, through them, in the activations.

    Call it on what ``fold(model, batchnorm=True)`` returns, before quantizing. Brevitas' `EqualizeGraph` does what it
    does exactly (residual sums, concatenations, gates); grouped convolutions and PReLU, which it leaves, are done here.
    Layers before a ReLU6, a Hardswish or another function that is not homogeneous stay, and are logged.

    Args:
        model: folded, in floating point.
        example_inputs: what the model is called with; brevitas runs only if they are given, since nobody else could
            tell whether it was right.
        inplace: change `model` itself; by default a copy is changed.

    Raises:
        UnsupportedError: foldable layers are left, or a convolution is called twice in one forward.
        FoldMismatchError: the outputs in float64 differ by more than 1e-10 of their largest value; `model` is as it was.
        ModuleNotFoundError: with `example_inputs`, brevitas is not installed; it comes with the extra ``quantization``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.PReLU(), nn.Conv2d(2, 4, 3))
        >>> _ = net[0].weight.data[0].mul_(100)
        >>> even = equalize(net)
        >>> ranges = even[0].weight.abs().amax((1, 2, 3))
        >>> bool(ranges.max() / ranges.min() < 10)
        True
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, Foldable)]
    if layers:
        raise UnsupportedError(f"{layers[0]}: a foldable layer; fold the network first, with batchnorm=True")
    work = copy_of(model)
    _refuse_reused(work)
    exact = copy_of(work).double().eval()
    if example_inputs is not None:
        _by_brevitas(exact)
    clipped = _by_pairs(exact)
    if example_inputs is not None:
        _compare(copy_of(work).double().eval(), exact, example_inputs)
    if clipped:
        _LOG.warning(
            "%d layers keep their ranges: %s; what follows them is clipped or curved (ReLU6, Hardswish)",
            *(len(clipped), some(clipped)),
        )
    target = model if inplace else work
    with torch.no_grad():
        for name, values in exact.named_parameters():
            target.get_parameter(name).copy_(values)
    return target
