"""The SmallNets that ExpandNets expands, with 3×3 and with 7×7 kernels.

Origin: S. Guo, J. M. Alvarez, M. Salzmann, "ExpandNets: Linear Over-parameterization to Train Compact Convolutional
Networks", NeurIPS 2020, arXiv 1811.10495, table 1; defined by the published code (GUOShuxuan/expandnets,
``exp_cifar/models/cifar_tiny_3.py`` and ``cifar_tiny_7.py``, the class ``Cifar_Tiny``), whose names of modules are
kept. Three convolutions with biases, to 8, 16 and 32 channels, behind each a norm, a rectifier and 2×2 maximum pooling;
then 64 features and the logits. The 3×3 kernels have no padding (2×2 pixels are left at the end), 7×7 keep the size.

    net = foldconv.expand(foldconv.zoo.create("expandnets_3x3"), "expandnet")

The published expanded networks have only 3 channels inside the first convolution's chain, where `expandnet` has 4 × 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import UnsupportedError
from ._registry import register


class SmallNet(nn.Module):
    """The family: 32×32 images (batch, in_channels, 32, 32) → logits (batch, num_classes).

    Args:
        kernel_size: 3 (without padding) or 7 (with).
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        UnsupportedError: another kernel size.

    >>> SmallNet(7)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, kernel_size: int = 3, num_classes: int = 10, in_channels: int = 3):
        super().__init__()
        if kernel_size not in (3, 7):
            raise UnsupportedError(f"kernel_size: the paper's networks have 3 or 7, received {kernel_size}")
        padding, pixels = (0, 2) if kernel_size == 3 else (3, 4)
        self.default_cfg = {"input_size": (in_channels, 32, 32), "num_classes": num_classes}
        self.conv1 = nn.Conv2d(in_channels, 8, kernel_size, padding=padding)
        self.conv1_bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, kernel_size, padding=padding)
        self.conv2_bn = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 32, kernel_size, padding=padding)
        self.conv3_bn = nn.BatchNorm2d(32)
        self.fc1 = nn.Linear(32 * pixels**2, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, before the softmax."""
        x = F.max_pool2d(F.relu(self.conv1_bn(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2_bn(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.conv3_bn(self.conv3(x))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


@register
def expandnets_3x3(num_classes: int = 10, in_channels: int = 3) -> SmallNet:
    """SmallNet with 3×3 kernels."""
    return SmallNet(3, num_classes, in_channels)


@register
def expandnets_7x7(num_classes: int = 10, in_channels: int = 3) -> SmallNet:
    """SmallNet with 7×7 kernels."""
    return SmallNet(7, num_classes, in_channels)
