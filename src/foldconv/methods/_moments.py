"""`MomentSum`: a sum of branches whose 1×1 branches run as one convolution while training, where that is exact.

It reads its modules at each forward, and runs them, one by one, wherever they are not what they were built as, where
somebody looks (a hook, a tracer, a compiler, a function transform), where a norm does not normalize by this batch and
keep statistics of it, where rounding would show, and where the branches are faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Sum
from ..algebra.convolutions import CONVOLUTIONS
from ..algebra.rules import conv_geometry
from ..layers.foldable import all_are_watched, is_altered
from ..ops import is_recorded
from ..ops._moments import ILL, Main, Norm, Window, add_points, moments_of, statistics

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
WORTHWHILE = 24
"""Positions of a batch for each channel, from which on products over channels are cheaper than maps."""


class MomentSum(Sum):
    """Branches, added; those of one tap and the identity by the moments of their input, if that is exact and faster.

    The first branch is a convolution and perhaps a norm, the others end in norms.

    Example:
        >>> branch = lambda *modules: nn.Sequential(*modules, nn.BatchNorm2d(4))
        >>> block = MomentSum(branch(nn.Conv2d(4, 4, 3, padding=1)), point=branch(nn.Conv2d(4, 4, 1, bias=False)))
        >>> block(torch.zeros(8, 4, 5, 5)).shape
        torch.Size([8, 4, 5, 5])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Run the branches on `input` and add."""
        output = _by_moments(self, input)
        return super().forward(input) if output is None else output


class _Branch(NamedTuple):
    """A branch as it was built: padding in front (negative: a crop), a convolution, a norm."""

    padding: list[tuple[int, int]]
    conv: Any
    norm: Any


def _by_moments(block: nn.Module, x: Tensor) -> Tensor | None:
    """The sum, or None where the branches have to run."""
    if not _can_see(block, x):
        return None
    branches: list[Any] = [_branch_of(child, x.dim() - 2) for child in block.children()]
    if len(branches) < 2 or any(branch is None for branch in branches):
        return None
    main, *others = branches
    if main.conv is None or any(pair != (0, 0) for pair in main.padding):
        return None
    window = _window_of(main, others, x.dim() - 2)
    if window is None or not _is_trained(x, branches):
        return None
    window, pads = window
    conv = main.conv
    if any(pads):
        x = F.pad(x, pads, _MODES[conv.padding_mode])
    size = _sizes(x, conv, window)
    positions = len(x)
    for n in size:
        positions *= n
    if min(size) < 1 or positions < max(2, WORTHWHILE * max(conv.weight.shape[1], conv.weight.shape[0] // conv.groups)):
        return None
    points = others
    with torch.no_grad():
        moments = moments_of(x, window, size)
        found = [statistics(moments, None if b.conv is None else b.conv.weight) for b in points]
        for branch, (_, variance, terms) in zip(points, found):
            if not bool((terms <= ILL * (variance + branch.norm.eps)).all()):
                return None
        norms = [branch.norm for branch in points]
        for norm, (mean, variance, _) in zip(norms, found):
            factor = _factor(norm)
            norm.running_mean.lerp_(mean, factor)
            norm.running_var.lerp_(variance * (positions / (positions - 1)), factor)
        norm = main.norm
        first = Main(
            conv.weight,
            conv.bias,
            None if norm is None else _parts(norm),
            None if norm is None else norm.running_mean,
            None if norm is None else norm.running_var,
            0.0 if norm is None else _factor(norm),
        )
    parts = [(None if b.conv is None else b.conv.weight, _parts(b.norm)) for b in points]
    return add_points(x, first, parts, moments, [variance for _, variance, _ in found], window)


def _can_see(block: nn.Module, x: Any) -> bool:
    """Do torch's own operations run on an ordinary tensor, and nobody looks on?"""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not is_recorded()
        and not all_are_watched()
        and x.numel() > 0
        and not any(is_altered(module) or "parametrizations" in module._modules for module in block.modules())
    )


def _branch_of(module: nn.Module, ndim: int) -> _Branch | None:
    """What a branch is made of; None: of something else."""
    if type(module) is not nn.Sequential:
        return None
    parts: list[Any] = list(module._modules.values())
    norm = parts.pop() if parts and type(parts[-1]) in _NORMS else None
    conv = parts.pop() if parts and type(parts[-1]) is CONVOLUTIONS[ndim] else None
    padding = [(0, 0)] * ndim
    for pad in parts:
        if type(pad) not in _PADS or len(pad.padding) != 2 * ndim:
            return None
        pairs = [(pad.padding[i], pad.padding[i + 1]) for i in range(2 * ndim - 2, -1, -2)]
        padding = [(a + c, b + d) for (a, b), (c, d) in zip(padding, pairs)]
    return _Branch(padding, conv, norm)


def _window_of(main: _Branch, others: Sequence[Any], ndim: int) -> tuple[Window, list[int]] | None:
    """The convolution's geometry on an input that is padded first, and that padding; None: no point lies inside."""
    conv = main.conv
    geometry = conv_geometry(conv)
    padding, pads = geometry["padding"], [0] * (2 * ndim)
    if geometry["padding_mode"] != "zeros" or any(before != after for before, after in padding):
        pads = [n for pair in reversed(padding) for n in pair]
        before, own = [pair[0] for pair in padding], (0,) * ndim
    else:
        before, own = [0] * ndim, tuple(pair[0] for pair in padding)
    offset = None
    for branch in others:
        begin = [-n for n, _ in branch.padding]
        if branch.conv is not None:
            g = conv_geometry(branch.conv)
            begin = [b - p for b, (p, _) in zip(begin, g["padding"])]
            if (
                set(branch.conv.weight.shape[2:]) != {1}
                or branch.conv.bias is not None
                or tuple(g["stride"]) != tuple(geometry["stride"])
                or g["groups"] != geometry["groups"]
                or branch.conv.weight.shape[:2] != conv.weight.shape[:2]
            ):
                return None
        elif set(geometry["stride"]) != {1} or conv.weight.shape[0] != conv.weight.shape[1] * conv.groups:
            return None
        if branch.norm is None or min(begin) < 0 or (offset is not None and begin != offset):
            return None
        offset = begin
    assert offset is not None
    offset = tuple(o + b for o, b in zip(offset, before))
    return Window(geometry["stride"], own, geometry["dilation"], geometry["groups"], offset), pads


def _sizes(x: Tensor, conv: Any, window: Window) -> list[int]:
    """The convolution's outputs."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], window.padding, window.dilation, conv.weight.shape[2:], window.stride)
    ]


def _is_trained(x: Tensor, branches: Sequence[Any]) -> bool:
    """Does each norm normalize by this batch and follow it, and is all of one type?"""
    for branch in branches:
        norm = branch.norm
        if norm is not None and (
            not (norm.training and norm.track_running_stats) or norm.running_mean is None or norm.running_var is None
        ):
            return False
        for module in (branch.conv, norm):
            for t in () if module is None else (*module._parameters.values(), *module._buffers.values()):
                if t is not None and t.dim() and not _is_like(t, x):
                    return False
    return True


def _is_like(t: Tensor, x: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.dtype == x.dtype and t.device == x.device


def _parts(norm: Any) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)


def _factor(norm: Any) -> float:
    """How much of this batch goes into the running statistics; counts the batch."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return norm.momentum or 0.0
