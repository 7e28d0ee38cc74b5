"""The residual networks for CIFAR, with the shortcuts of the paper, which have no parameters.

Origin: K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 and
table 6: a 3×3 convolution to 16 channels, three stages of n basic blocks with 16, 32 and 64 channels, the later two
beginning with stride 2, global average pooling, one linear layer; depth = 6n + 2. Shortcuts across stages are the
paper's option A: every second pixel, and zeros for the new channels.

Modules are named, and the zeros lie on both sides of the old channels, as in the common reimplementation
(akamaster/pytorch_resnet_cifar10); the paper does not say on which side. `digits_resnet` is the same family with
convolutions in the shortcuts (option B). `cifar_plain20` is the paper's plain network of 20 layers: no shortcuts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import UnsupportedError
from ._registry import register


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters: (batch, in, h, w) → (batch, out, h/stride, w/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual sum (in a plain network nothing is added), then the rectifier."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if not self.shortcut:
            return F.relu(y)
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """The family: images (batch, in_channels, h, w) → logits (batch, num_classes).

    Args:
        depth: number of weighted layers, 6n + 2.
        width: channels of the first stage; the later stages have two and four times as many.
        num_classes: number of logits.
        in_channels: channels of the images.
        shortcuts: False for the paper's plain networks.

    Raises:
        UnsupportedError: a depth that is not 6n + 2.

    >>> CifarResNet(depth=8, width=4)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, depth: int = 20, width: int = 16, num_classes: int = 10, in_channels: int = 3, shortcuts: bool = True
    ):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UnsupportedError(f"depth must be 6n + 2 with n ≥ 1 (20, 32, 44, ...), received {depth}")
        self.default_cfg = {"input_size": (in_channels, 32, 32), "num_classes": num_classes}
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage in range(3):
            blocks, out_channels = nn.Sequential(), width * 2**stage
            for block in range((depth - 2) // 6):
                stride = 2 if stage and not block else 1
                blocks.append(BasicBlock(channels, out_channels, stride, shortcuts))
                channels = out_channels
            self.add_module(f"layer{stage + 1}", blocks)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)  # the paper's, its reference 13

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, before the softmax."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(3):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _builder(depth: int) -> Callable[..., nn.Module]:
    def build(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
        return CifarResNet(depth, width, num_classes, in_channels)

    build.__name__ = f"cifar_resnet{depth}"
    build.__doc__ = f"ResNet-{depth} for 32×32 images."
    return build


for _depth in (20, 32, 44, 56, 110):
    register(_builder(_depth))


@register
def cifar_plain20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """Plain-20 for 32×32 images: ResNet-20 without its shortcuts."""
    return CifarResNet(20, width, num_classes, in_channels, shortcuts=False)
