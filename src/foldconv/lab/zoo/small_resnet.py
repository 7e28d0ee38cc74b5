"""Small residual networks for small images.

Origin: K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2:
a 3×3 convolution, three stages of n basic blocks with widths w, 2w, 4w, each later stage halving the resolution,
global average pooling, one linear layer; depth = 6n + 2. Shortcuts that change shape are 1×1 convolutions
(option B), so that every path is made of layers that fold.
"""

from __future__ import annotations

import torch
from torch import nn

from ...errors import UnsupportedError
from ._registry import register


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: (batch, in, h, w) → (batch, out, h/stride, w/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual sum, then the rectifier."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """The family: images (batch, in_channels, h, w) → logits (batch, num_classes).

    Args:
        depth: number of weighted layers on the main path, 6n + 2.
        width: channels of the first stage; the later stages have two and four times as many.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        UnsupportedError: a depth that is not 6n + 2.

    >>> SmallResNet(depth=14, width=4)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, depth: int = 8, width: int = 16, num_classes: int = 10, in_channels: int = 1):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UnsupportedError(f"depth must be 6n + 2 with n ≥ 1 (8, 14, 20, ...), received {depth}")
        self.default_cfg = {"input_size": (in_channels, 8, 8), "num_classes": num_classes}
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for index in range((depth - 2) // 6):
                out_channels = width * 2**stage
                blocks.append(BasicBlock(channels, out_channels, stride=2 if stage and not index else 1))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, before the softmax."""
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


@register
def digits_resnet(depth: int = 8, width: int = 16, num_classes: int = 10, in_channels: int = 1) -> SmallResNet:
    """The network of ``foldconv train``'s default: 8 layers for 8×8 pixel digits, 78 thousand parameters.

    >>> sum(parameter.numel() for parameter in digits_resnet().parameters())
    77754
    """
    return SmallResNet(depth, width, num_classes, in_channels)
