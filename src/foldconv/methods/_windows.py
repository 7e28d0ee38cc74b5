"""A 1×1 convolution, a norm that pads, a window, a norm: run by the moments of the input, where that is exact."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Sum
from ..algebra.convolutions import CONVOLUTIONS, as_tuple
from ..ops._maps import Window, per_group
from ..ops._moments import Main, Moments, Norm, statistics
from ..ops._padded import Average, add_average, add_window_of_point, moments, normalizing
from . import _moments
from ._branch_parts import NORMS, Branch, factor_of, follow, is_exact, is_trained, padding_of
from ._moments import can_see

POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def zero_padded(pad: Any, window: Any, like: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """The window as a convolution that pads zeros: its kernel, what it makes of `shift`, and the other arguments."""
    padding = [before for before, _ in pad.padding]
    if type(window) in POOLS.values():
        size, groups, dilation = as_tuple(window.kernel_size, like.dim() - 2), shift.numel(), 1
        weight, constant = like.new_full((groups, 1, *size), 1 / math.prod(size)), shift.flatten()
    else:
        weight, groups, dilation = window.weight, window.groups, window.dilation
        constant = (weight.flatten(2).sum(2).unflatten(0, (groups, -1)) @ shift.view(groups, -1, 1)).flatten()
    return weight, constant, (window.stride, padding, dilation, groups)


def add_by_moments(output: Tensor | None, row: Any, x: Any, shared: Any) -> Tensor | None:
    """The sum of `output` and what the row of four makes of `x`; None: the modules have to run."""
    first, pad, window, last = row
    norm: Any = pad.norm
    conv: Any = first._modules.get("conv") if type(first) is Sum and len(first._modules) == 2 else first
    if conv is not first and type(first._modules.get("identity")) is not nn.Identity:
        return None
    if type(conv) not in CONVOLUTIONS.values() or type(norm) not in NORMS or type(last) not in NORMS:
        return None
    ndim, groups = x.dim() - 2, conv.groups
    if ndim < 1 or x.shape[1] != conv.weight.shape[1] * groups or getattr(window, "bias", None) is not None:
        return None
    if conv.bias is not None or conv.weight[0, 0].numel() != 1 or set(conv.stride) != {1} or any(padding_of(conv)):
        return None
    if not all(can_see(part, x) for part in row):
        return None
    behind = window if type(window) in CONVOLUTIONS.values() else None
    if not (is_trained(x, Branch([], conv, norm)) and is_trained(x, Branch([], behind, last))):
        return None
    count = len(x) * x.shape[2:].numel()
    if count < 2 or x.numel() <= _moments.FEW:
        return None
    kernel = per_group(conv.weight, groups)
    if conv is not first:
        kernel = kernel + torch.eye(kernel.shape[2], dtype=x.dtype).expand_as(kernel)
    # From here on the window: where it reads, and how often.
    stride, dilation = (as_tuple(n, ndim) for n in (window.stride, getattr(window, "dilation", 1)))
    size, padding = as_tuple(window.kernel_size, ndim), tuple(before for before, _ in pad.padding)
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(x.shape[2:], padding, dilation, size, stride)
    ]
    positions = len(x) * math.prod(sizes)
    if min(sizes) < 1 or positions < 2:
        return None  # torch says so
    mean, covariance = moments(x, groups) if shared is None else shared.of(groups)
    with torch.no_grad():
        found = statistics(Moments(mean, covariance, count), kernel.flatten(0, 1))
        if not is_exact(found, norm):
            return None
        follow(norm, found, count)
        shift = pad.of_zero(x)
        weight, constant, (*_, shares) = zero_padded(pad, window, x, shift)
    if behind is None:
        geometry = Window(stride, padding, dilation, groups, (0,) * ndim)
        inner, outer = (Norm(n.weight, n.bias, n.eps) for n in (norm, last))

        def accept(found: Average) -> bool:
            if not is_exact(found, last):
                return False
            follow(last, found, positions)
            return True

        y = add_average(output, x, (mean, covariance), kernel, inner, shift.flatten(), outer, size, geometry, accept)
        if y is not None:
            return y
    else:
        weight = window.weight
    taken = -shift.flatten() if norm.bias is None else norm.bias - shift.flatten()
    merged, centre = normalizing(mean, covariance, kernel, norm.weight, taken, norm.eps)
    with torch.no_grad():
        factor = factor_of(last)
    main = Main(weight, constant, Norm(last.weight, last.bias, last.eps), last.running_mean, last.running_var, factor)
    return add_window_of_point(output, x, merged, centre, main, Window(stride, padding, dilation, shares, (0,) * ndim))
