"""The weight gradient of a large depthwise kernel, for which torch's CPU takes five times as long as it needs."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ._cpu import _NUMPY, reason_against
from ._threads import run

FEW_TAPS = 9
"""Up to so many torch is fast."""


def weight_gradient(g: Tensor, x: Tensor, weight: Tensor, window: Any) -> Tensor | None:
    """Of a depthwise convolution of images, `g` and `x` channels last; None: torch has to compute it.

    `window` says stride, padding and dilation.
    """
    if not is_large_depthwise(weight, window.groups) or len(weight) != window.groups:
        return None
    if reason_against(weight) is not None:
        return None
    loops = importlib.import_module("._numba_depthwise", __package__)
    sums = torch.empty(weight.shape[0], *weight.shape[2:], dtype=x.dtype)
    flat = (t.detach().permute(0, 2, 3, 1).reshape(-1).numpy() for t in (g, x))
    sizes = (len(x), *g.shape[2:], *x.shape[2:], len(weight), *weight.shape[2:])
    geometry = window.stride, window.padding, window.dilation
    loop = loops.weight_gradient(_NUMPY[weight.dtype])
    run(loop, x.numel(), *flat, sums.view(-1).numpy(), sizes, *geometry)
    return sums.view_as(weight)


def is_large_depthwise(weight: Tensor, groups: int) -> bool:
    """Is it a kernel of images, of one input a group, with more than a few taps?"""
    return weight.dim() == 4 and weight.shape[1] == 1 < groups and weight[0].numel() > FEW_TAPS
