"""Cifar-quick: three 5×5 convolutions and two linear layers for 32×32 images.

Origin: Caffe's ``examples/cifar10/cifar10_quick_train_test.prototxt`` (Y. Jia et al., "Caffe: Convolutional
Architecture for Fast Feature Embedding", 2014): convolutions to 32, 32 and 64 channels with biases and no norm, maximum
pooling behind the first and average pooling behind the others, all 3×3 with stride 2, then 64 features and the logits,
with no rectifier between the two linear layers.

With norms: X. Ding et al., "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution
Blocks", ICCV 2019, whose published code (``base_model/cfqk.py``) puts a norm behind every convolution, a rectifier
between the linear layers, and pools without the partial windows at the border that Caffe adds: 3×3 pixels are left
instead of 4×4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ._registry import register


class CifarQuick(nn.Module):
    """The family: 32×32 images (batch, in_channels, 32, 32) → logits (batch, num_classes).

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        batchnorm: ACNet's form with norms instead of Caffe's.

    >>> CifarQuick()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, batchnorm: bool = False):
        super().__init__()
        self.default_cfg = {"input_size": (in_channels, 32, 32), "num_classes": num_classes}
        self.batchnorm = batchnorm
        channels = in_channels
        for index, out_channels in enumerate((32, 32, 64)):
            block = nn.Sequential()
            block.add_module("conv", nn.Conv2d(channels, out_channels, 5, padding=2, bias=not batchnorm))
            if batchnorm:
                block.add_module("bn", nn.BatchNorm2d(out_channels))
            block.add_module("relu", nn.ReLU(inplace=True))
            self.add_module(f"conv{index + 1}", block)
            channels = out_channels
        # Caffe's windows may hang over the border; what hangs over counts in no average.
        self.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=not batchnorm)
        self.pool2 = nn.AvgPool2d(3, stride=2, ceil_mode=not batchnorm)
        self.pool3 = nn.AvgPool2d(3, stride=2, ceil_mode=not batchnorm)
        self.fc1 = nn.Linear(channels * (3 if batchnorm else 4) ** 2, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, before the softmax."""
        # Caffe rectifies behind its first pooling; with a maximum the order makes no difference.
        for index in (1, 2, 3):
            x = self.get_submodule(f"conv{index}")(x)
            x = self.get_submodule(f"pool{index}")(x)
        x = self.fc1(x.flatten(1))
        return self.fc2(F.relu(x) if self.batchnorm else x)


@register
def cifar_quick(num_classes: int = 10, in_channels: int = 3) -> CifarQuick:
    """Caffe's Cifar-quick, without norms.

    >>> sum(parameter.numel() for parameter in cifar_quick().parameters())
    145578
    """
    return CifarQuick(num_classes, in_channels)


@register
def cifar_quick_bn(num_classes: int = 10, in_channels: int = 3) -> CifarQuick:
    """ACNet's Cifar-quick, with norms.

    >>> cifar_quick_bn().fc1
    Linear(in_features=576, out_features=64, bias=True)
    """
    return CifarQuick(num_classes, in_channels, batchnorm=True)
