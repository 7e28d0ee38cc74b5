"""The network of the MNIST demonstration in PyTorch of DO-Conv's repository.

Origin: J. Cao et al., "DO-Conv: Depthwise Over-parameterized Convolutional Layer", TIP 2022, arXiv 2006.12030,
sample_pt.py of the published code: three 3×3 convolutions of stride 2 with a rectifier behind each, the last one too,
and global average pooling; no norm, no linear layer.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ._registry import register


@register
def mnist_demo(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """Images (batch, in_channels, h, w) → logits (batch, num_classes).

    >>> sum(parameter.numel() for parameter in mnist_demo().parameters())
    3930
    """
    parts: list[nn.Module] = []
    for channels, filters in [(in_channels, 16), (16, 16), (16, num_classes)]:
        parts += [nn.Conv2d(channels, filters, 3, stride=2, padding=1), nn.ReLU()]
    net: Any = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.default_cfg = {"input_size": (in_channels, 28, 28), "num_classes": num_classes}
    return net
