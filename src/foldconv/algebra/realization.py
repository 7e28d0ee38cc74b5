"""From a `Kernel` to the plain torch convolution that computes it.

torch pads both sides of a dimension alike (or the way ``padding="same"`` does), a `Kernel` may not; the window
is then enlarged with zero taps until it does. The function is the same, the cost grows, nothing is approximated.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import UnsupportedError
from .kernel import CONVOLUTIONS, TRANSPOSED, Kernel


def realize(kernel: Kernel) -> _ConvNd:
    """A plain convolution with the kernel's function, dtype and device.

    Example:
        >>> realize(Kernel(torch.ones(4, 2, 3, 3), padding=((1, 1), (1, 1)), groups=2))
        Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, bias=False)
        >>> realize(Kernel(torch.ones(1, 1, 2, 2), padding=((0, 1), (0, 1))))
        Conv2d(1, 1, kernel_size=(2, 2), stride=(1, 1), padding=same, bias=False)
    """
    return _transposed(kernel) if kernel.transposed else _gathering(kernel)


def _gathering(kernel: Kernel) -> _ConvNd:
    padding: str | tuple[int, ...] = "same"
    if not _is_same(kernel):
        kernel, padding = _symmetric(kernel)
    module = CONVOLUTIONS[kernel.ndim](
        kernel.in_channels,
        kernel.out_channels,
        kernel.size,  # pyright: ignore[reportArgumentType]
        stride=kernel.stride,  # pyright: ignore[reportArgumentType]
        padding=padding,  # pyright: ignore[reportArgumentType]
        dilation=kernel.dilation,  # pyright: ignore[reportArgumentType]
        groups=kernel.groups,
        bias=kernel.bias is not None,
        padding_mode=kernel.padding_mode if any(kernel.pads) else "zeros",
        device="meta",
    )
    return _filled(module, kernel.weight, kernel.bias)


def _transposed(kernel: Kernel) -> _ConvNd:
    if kernel.padding_mode != "zeros":
        raise UnsupportedError("a transposed convolution has zero padding only")
    kernel = _room(kernel)
    before = [b for b, _ in kernel.padding]
    spare = [b - a for b, a in kernel.padding]
    # torch allows an output padding below max(stride, dilation); more is bought with zero taps behind.
    limit = [max(s, d) for s, d in zip(kernel.stride, kernel.dilation)]
    behind = [max(0, math.ceil((n - m + 1) / d)) for n, m, d in zip(spare, limit, kernel.dilation)]
    kernel = kernel.embedded([0] * kernel.ndim, behind)
    out, per_group = kernel.weight.shape[:2]
    module = TRANSPOSED[kernel.ndim](
        kernel.in_channels,
        out,
        kernel.size,  # pyright: ignore[reportArgumentType]
        stride=kernel.stride,  # pyright: ignore[reportArgumentType]
        padding=tuple(before),  # pyright: ignore[reportArgumentType]
        output_padding=tuple(b - a for b, a in kernel.padding),  # pyright: ignore[reportArgumentType]
        dilation=kernel.dilation,  # pyright: ignore[reportArgumentType]
        groups=kernel.groups,
        bias=kernel.bias is not None,
        device="meta",
    )
    weight = kernel.weight.reshape(kernel.groups, out // kernel.groups, per_group, *kernel.size).transpose(1, 2)
    return _filled(module, weight.reshape(kernel.in_channels, out // kernel.groups, *kernel.size), kernel.bias)


def _filled(module: _ConvNd, weight: torch.Tensor, bias: torch.Tensor | None) -> _ConvNd:
    module.weight = nn.Parameter(weight.detach().contiguous().clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())
    return module


def _is_same(kernel: Kernel) -> bool:
    """Does ``padding="same"`` (stride 1, the odd sample of padding behind) describe this kernel's padding?"""
    uneven = any(before != after for before, after in kernel.padding)
    return uneven and all(
        s == 1 and before + after == d * (k - 1) and before == (d * (k - 1)) // 2
        for s, (before, after), d, k in zip(kernel.stride, kernel.padding, kernel.dilation, kernel.size)
    )


def _symmetric(kernel: Kernel) -> tuple[Kernel, tuple[int, ...]]:
    """The kernel in a window whose padding is the same on both sides, and that padding."""
    target = [max(before, after, 0) for before, after in kernel.padding]
    dilation = [
        math.gcd(d if k > 1 else 0, t - before, t - after) or 1
        for d, k, t, (before, after) in zip(kernel.dilation, kernel.size, target, kernel.padding)
    ]
    # A pointwise dimension keeps its dilation where that costs nothing, so that arguments survive.
    dilation = [
        d if k == 1 and before == after == t else new
        for d, k, t, (before, after), new in zip(kernel.dilation, kernel.size, target, kernel.padding, dilation)
    ]
    kernel = kernel.dilated(dilation)
    front = [(t - before) // d for t, (before, _), d in zip(target, kernel.padding, dilation)]
    back = [(t - after) // d for t, (_, after), d in zip(target, kernel.padding, dilation)]
    return kernel.embedded(front, back), tuple(target)


def _room(kernel: Kernel) -> Kernel:
    """A transposed kernel with ``before ≥ max(after, 0)``: zero taps in front, cropped away again."""
    need = [max(after - before, -before, 0) for before, after in kernel.padding]
    dilation = [math.gcd(d, n) if n else d for d, n in zip(kernel.dilation, need)]
    kernel = kernel.dilated(dilation)
    return kernel.embedded([n // d for n, d in zip(need, dilation)], [0] * kernel.ndim)
