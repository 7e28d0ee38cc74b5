"""Plain-18 and Plain-34: the residual networks of these depths without their shortcuts.

Origin: K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 3.3, figure
3 and table 1: what the paper compares its residual networks to, and the "Plain" of DO-Conv's ImageNet table
(J. Cao et al., arXiv 2006.12030). A 7×7 stem and four stages of 3×3 convolutions, each with norm and rectifier.

Modules are named as torchvision's ResNet-18 names them, without the shortcuts' ``downsample``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...errors import UnsupportedError
from ._registry import register


class PlainBlock(nn.Module):
    """Two 3×3 convolutions, norm and rectifier behind each: (batch, in, h, w) → (batch, out, h/stride, w/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One convolution after the other."""
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class PlainNet(nn.Module):
    """The family: images (batch, in_channels, h, w) → logits (batch, num_classes).

    Args:
        depths: pairs of convolutions in each of the four stages.
        width: channels of the first stage; each later one has twice as many.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        UnsupportedError: for other than four stages, or an empty one.

    >>> PlainNet((1, 1, 1, 1), width=8, num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        num_classes: int = 1000,
        in_channels: int = 3,
    ):
        super().__init__()
        if len(depths) != 4 or min(depths) < 1:
            raise UnsupportedError(f"depths: expected four stages of at least one block, received {depths}")
        self.default_cfg = {"input_size": (in_channels, 224, 224), "num_classes": num_classes}
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for stage, depth in enumerate(depths):
            blocks, out_channels = nn.Sequential(), width * 2**stage
            for block in range(depth):
                blocks.append(PlainBlock(channels, out_channels, stride=2 if stage and not block else 1))
                channels = out_channels
            self.add_module(f"layer{stage + 1}", blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, before the softmax."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


@register
def plain18(num_classes: int = 1000, in_channels: int = 3, width: int = 64) -> PlainNet:
    """ResNet-18 without shortcuts."""
    return PlainNet((2, 2, 2, 2), width, num_classes, in_channels)


@register
def plain34(num_classes: int = 1000, in_channels: int = 3, width: int = 64) -> PlainNet:
    """ResNet-34 without shortcuts."""
    return PlainNet((3, 4, 6, 3), width, num_classes, in_channels)
