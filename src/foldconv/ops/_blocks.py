"""Where nothing is compiled: torch's own products, over blocks of neighbouring input channels, and gradients by hand.

A matrix per input channel (k × S, nine by nine) is too small for a fast product. Several channels side by side are one
block-diagonal matrix: more multiplications, most of them by zero, and half the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._buffers import empty
from ._torch import shaped

name = "blocks"
_SIDE = 16
"""Rows of a block at least, where channels divide."""


def least(*tensors: Tensor) -> int:
    """Below, laying out the blocks takes longer than they save."""
    return 1 << 13


def reason_against(*tensors: Tensor) -> str | None:
    """Why this path cannot take these tensors."""
    first = tensors[0]
    if first.device.type != "cpu":
        return f"the tensors are on {first.device.type}"
    if first.dtype not in (torch.float32, torch.float64):
        return f"{first.dtype} was not tried"
    if len(tensors) > 2:
        return "it composes DO-Conv only"
    return None


def depthwise(taps: Tensor, D: Tensor, groups: int) -> Tensor:
    """See `foldconv.ops.compose_depthwise`."""
    return shaped(_chain(taps.flatten(2), D.transpose(1, 2), groups), taps)


def depthwise_gradients(grad: Tensor, taps: Tensor, D: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The gradients of `taps` and `D`."""
    grad = grad.flatten(2)
    return shaped(_chain(grad, D, groups), taps), _outer(grad, taps.flatten(2), groups)


def _chain(taps: Tensor, D: Tensor, groups: int) -> Tensor:
    """``K[o, i, m] = taps[o, i, m] + Σ_s D[c, s, m] · taps[o, i, s]``, in the layout of `taps`."""
    out, per_group, multiplier = taps.shape
    channels, _, k = D.shape
    side = _channels_in_a_block(per_group, min(k, multiplier))
    full = D + torch.eye(multiplier, k, dtype=D.dtype, device="cpu")
    blocks = torch.zeros(channels // side, side * multiplier, side * k, dtype=D.dtype, device="cpu")
    on_diagonal = blocks.view(-1, side, multiplier, side, k).diagonal(dim1=1, dim2=3)
    on_diagonal.copy_(full.view(-1, side, multiplier, k).permute(0, 2, 3, 1))
    rows = _rows(taps, groups, side)
    if groups == 1:
        kernel = empty((out, per_group, k), D.dtype)
        torch.bmm(rows, blocks, out=kernel.view(out, -1, side * k).transpose(0, 1))
    else:
        product = torch.bmm(rows, blocks).unflatten(0, (groups, -1))
        kernel = product.transpose(1, 2).reshape(out, per_group, k).contiguous()
    return _like(taps, kernel)


def _outer(left: Tensor, right: Tensor, groups: int) -> Tensor:
    """``(G·I, k, S)``: the sum over outputs of ``left[o, i, m] · right[o, i, s]``."""
    (_, per_group, k), multiplier = left.shape, right.shape[2]
    side = _channels_in_a_block(per_group, min(k, multiplier))
    product = torch.bmm(_rows(left, groups, side).transpose(1, 2), _rows(right, groups, side))
    on_diagonal = product.view(-1, side, k, side, multiplier).diagonal(dim1=1, dim2=3)
    return on_diagonal.permute(0, 3, 1, 2).reshape(-1, k, multiplier)


def _channels_in_a_block(per_group: int, k: int) -> int:
    side = 1
    while side * k < _SIDE and per_group % (2 * side) == 0:
        side *= 2
    return side


def _rows(taps: Tensor, groups: int, side: int) -> Tensor:
    """``(blocks, outputs of a group, taps of a block)``."""
    out, per_group, k = taps.shape
    if groups == 1:
        return taps.reshape(out, per_group // side, side * k).transpose(0, 1)
    return taps.reshape(groups, out // groups, per_group // side, side * k).transpose(1, 2).flatten(0, 1)


def _like(taps: Tensor, kernel: Tensor) -> Tensor:
    if taps.is_contiguous() or not taps.transpose(1, 2).is_contiguous():
        return kernel
    return kernel.transpose(1, 2).contiguous().transpose(1, 2)
