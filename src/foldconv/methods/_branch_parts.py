"""A branch as it was built, padding, convolution, norm: what it reads, and what its norm does with a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algebra.convolutions import CONVOLUTIONS, PickingConv2d
from ..algebra.rules import conv_geometry
from ..ops._maps import Window
from ..ops._moments import ILL, Main, Norm

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)


class Branch(NamedTuple):
    """A branch as it was built: padding in front (negative: a crop), a convolution, a norm."""

    padding: list[tuple[int, int]]
    conv: Any
    norm: Any


def branch_of(module: nn.Module, ndim: int) -> Branch | None:
    """What a branch is made of; None: of something else."""
    if type(module) is not nn.Sequential:
        return None
    parts: list[Any] = list(module._modules.values())
    norm = parts.pop() if parts and type(parts[-1]) in NORMS else None
    conv = parts.pop() if parts and type(parts[-1]) in (CONVOLUTIONS[ndim], PickingConv2d) else None
    padding = [(0, 0)] * ndim
    for pad in parts:
        if type(pad) not in _PADS or len(pad.padding) != 2 * ndim:
            return None
        pairs = [(pad.padding[i], pad.padding[i + 1]) for i in range(2 * ndim - 2, -1, -2)]
        padding = [(a + c, b + d) for (a, b), (c, d) in zip(padding, pairs)]
    return Branch(padding, conv, norm)


def window_of(main: Branch, ndim: int) -> tuple[Window, list[int]]:
    """The convolution's geometry on an input that is padded first, and that padding, for `F.pad`."""
    geometry = conv_geometry(main.conv)
    padding, pads, own = geometry["padding"], [0] * (2 * ndim), (0,) * ndim
    if geometry["padding_mode"] != "zeros" or any(before != after for before, after in padding):
        pads = [n for pair in reversed(padding) for n in pair]
    else:
        own = tuple(pair[0] for pair in padding)
    return Window(geometry["stride"], own, geometry["dilation"], geometry["groups"], (0,) * ndim), pads


def offset_of(branch: Branch, main: Branch, before: Sequence[int]) -> tuple[int, ...] | None:
    """Where a branch of one tap and the main one's stride begins to read; None: it is another, or pads."""
    begin, conv = [n - pair[0] for n, pair in zip(before, branch.padding)], branch.conv
    stride, weight, groups = tuple(main.conv.stride), main.conv.weight, main.conv.groups
    if branch.norm is None:
        return None
    if conv is None:
        if set(stride) != {1} or weight.shape[0] != weight.shape[1] * groups:
            return None
    else:
        if conv.bias is not None or tuple(conv.stride) != stride or conv.groups != groups:
            return None
        if conv.weight.shape[:2] != weight.shape[:2] or conv.weight[0, 0].numel() != 1:
            return None
        begin = [n - pair[0] for n, pair in zip(begin, conv_geometry(conv)["padding"])]
    return tuple(begin) if min(begin) >= 0 else None


def plain_window(branch: Branch, main: Branch) -> Window | None:
    """The geometry of a branch whose convolution reads the input itself; None: something stands before it."""
    conv = branch.conv
    if conv is None or branch.norm is None or conv.bias is not None or any(p != (0, 0) for p in branch.padding):
        return None
    window, pads = window_of(branch, len(branch.padding))
    return None if any(pads) else window


def sizes_of(spatial: Sequence[int], conv: Any, window: Window) -> list[int]:
    """The convolution's outputs."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(spatial, window.padding, window.dilation, conv.weight.shape[2:], window.stride)
    ]


def padding_of(conv: Any) -> list[int]:
    return [n for pair in conv_geometry(conv)["padding"] for n in pair]


def is_trained(x: Tensor, branch: Branch) -> bool:
    """Does its norm normalize by this batch and follow it, and is all of one type?"""
    norm = branch.norm
    if norm is not None and (
        not (norm.training and norm.track_running_stats) or norm.running_mean is None or norm.running_var is None
    ):
        return False
    tensors = [t for m in branch[1:] if m is not None for t in (*m._parameters.values(), *m._buffers.values())]
    return all(_is_like(t, x) for t in tensors if t is not None and t.dim())


def _is_like(t: Tensor, x: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.dtype == x.dtype and t.device == x.device


def parts_of(branch: Branch) -> Main:
    """A branch's tensors; counts the batch."""
    conv, norm = branch.conv, branch.norm
    if norm is None:
        return Main(conv.weight, conv.bias, None, None, None, 0.0)
    with torch.no_grad():
        factor = factor_of(norm)
    own = Norm(norm.weight, norm.bias, norm.eps)
    return Main(conv.weight, conv.bias, own, norm.running_mean, norm.running_var, factor)


def is_exact(found: tuple[Tensor, Tensor, Tensor], norm: Any) -> bool:
    """Is the variance, of `statistics`, large enough for its rounding not to show?"""
    return bool((found[2] <= ILL * (found[1] + norm.eps)).all())


@torch.no_grad()
def follow(norm: Any, found: tuple[Tensor, Tensor, Tensor], count: int) -> None:
    """Bring the running statistics up to date, with those of `count` values a channel."""
    factor = factor_of(norm)
    norm.running_mean.lerp_(found[0], factor)
    norm.running_var.lerp_(found[1].clamp_min(0) * (count / (count - 1)), factor)


def factor_of(norm: Any) -> float:
    """How much of this batch goes into the running statistics; counts the batch."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return norm.momentum or 0.0
