"""A tree of modules as the branches it adds: `kernel_of` one branch at a time."""

from __future__ import annotations

import contextlib
import itertools

import torch
from torch import nn

from ..algebra import Kernel, Sum, kernel_of
from .foldable import Foldable


def terms_of(tree: nn.Module, whole: Kernel) -> dict[str, Kernel]:
    """The branches of a tree as kernels without bias whose weights add up to the tree's, in its window and groups.

    The first `Sum` of the tree is taken apart, and a `Foldable` layer inside one of its branches (or in the place of
    a `Sum`) into its own branches. What stands before the branches and behind them belongs to each; a `Sum` deeper
    inside a branch is part of that branch.

    Args:
        tree: what `kernel_of` understands.
        whole: its kernel, in the dtype to compute in.

    Returns:
        One kernel per branch; names are those of the modules, joined by dots. A tree that adds nothing is one branch,
        named ``kernel``.

    Raises:
        UnsupportedError: the tree has no exact kernel.

    Example:
        >>> tree = Sum(main=nn.Conv2d(4, 4, 3, padding=1), point=nn.Conv2d(4, 4, 1), identity=nn.Identity())
        >>> {name: tuple(kernel.weight.shape) for name, kernel in terms_of(tree, kernel_of(tree)).items()}
        {'main': (4, 4, 3, 3), 'point': (4, 4, 3, 3), 'identity': (4, 4, 3, 3)}
    """
    tensor = next(itertools.chain(tree.parameters(), tree.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    with contextlib.nullcontext() if device.type == "cpu" else device:  # as in `kernel_of`
        found = _terms(tree, whole.in_channels, whole.ndim, whole.weight.dtype, True)
    # Adding zeros of the whole kernel's window is what brings a smaller one into it.
    zeros = whole.replace(weight=torch.zeros_like(whole.weight), bias=None)
    return {name or "kernel": kernel.replace(bias=None).add(zeros) for name, kernel in found.items()}


def _terms(module: nn.Module, channels: int, ndim: int, dtype: torch.dtype, split: bool) -> dict[str, Kernel]:
    if isinstance(module, Foldable):
        own = module.branch_kernels(dtype)
        return own if len(own) > 1 else {"": module.to_kernel(dtype)}
    if isinstance(module, Sum) and split:
        return {
            _join(name, inner): kernel
            for name, branch in module.named_children()
            for inner, kernel in _terms(branch, channels, ndim, dtype, isinstance(branch, Sum)).items()
        }
    if type(module).forward is not nn.Sequential.forward or not len(module._modules):
        return {"": kernel_of(module, in_channels=channels, ndim=ndim, dtype=dtype)}
    found: dict[str, Kernel] = {}
    for child in module.children():
        if len(found) > 1:  # the branches of a second sum would be products with those of the first
            later = {"": kernel_of(child, in_channels=channels, ndim=ndim, dtype=dtype)}
        else:
            later = _terms(child, channels, ndim, dtype, split)
        before = found or {"": None}
        found = {
            _join(a, b): second if first is None else first.then(second)
            for a, first in before.items()
            for b, second in later.items()
        }
        channels = next(iter(found.values())).out_channels
    return found


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
