"""Convolution, norm, rectifier: the building block of the plain networks whose originals are made of blocks."""

from __future__ import annotations

from torch import nn


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """A convolution without bias (``conv``) that keeps the size but for its stride, its norm (``bn``), and ``relu``.

    >>> list(dict(conv_norm(3, 8, 3).named_children()))
    ['conv', 'bn', 'relu']
    """
    block = nn.Sequential()
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
    block.add_module("conv", conv)
    block.add_module("bn", nn.BatchNorm2d(out_channels))
    if relu:
        block.add_module("relu", nn.ReLU(inplace=True))
    return block
