"""G-ResNeXt: the network of DGConv's published code, as the plain network that is expanded.

Origin: Z. Zhang et al., "Differentiable Learning-to-Group Channels via Groupable Convolutional Neural Networks",
ICCV 2019, arXiv 1908.05867; the skeleton is ResNeXt's (S. Xie et al., "Aggregated Residual Transformations for Deep
Neural Networks", CVPR 2017, table 1): a 7×7 stem, stages of bottlenecks 1×1 → 3×3 → 1×1 with the stride in the 3×3.

The width of a bottleneck is ResNeXt's, but its 3×3 is not grouped: DGConv learns the groups.

    net = foldconv.expand(foldconv.zoo.create("g_resnext50"), "dgconv", include="layer*.conv2", init="paper")

Modules are named as in the published code. With 32 groups everywhere this folds to a ResNeXt-50 32x4d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...errors import UnsupportedError
from ._registry import register


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 and a shortcut: (batch, in, h, w) → (batch, out, h/stride, w/stride)."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual sum, then the rectifier."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class GResNeXt(nn.Module):
    """The family: images (batch, in_channels, h, w) → logits (batch, num_classes).

    Args:
        layers: bottlenecks in each stage; four stages in the paper, one to four here.
        groups: how many times as wide as `width_per_group` the 3×3 of the first stage is (ResNeXt's cardinality).
        width_per_group: see `groups`; each later stage is twice as wide.
        num_classes: number of logits.
        in_channels: channels of the images.
        zero_init_residual: start every bottleneck as its shortcut, by zeros in its last norm.

    Raises:
        UnsupportedError: for no stage, an empty one, or more than four.

    >>> GResNeXt((1, 1), groups=2, width_per_group=4, num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        groups: int = 32,
        width_per_group: int = 4,
        num_classes: int = 1000,
        in_channels: int = 3,
        zero_init_residual: bool = False,
    ):
        super().__init__()
        if not 1 <= len(layers) <= 4 or min(layers) < 1:
            raise UnsupportedError(f"layers: expected one to four stages of at least one block, received {layers}")
        self.default_cfg = {"input_size": (in_channels, 224, 224), "num_classes": num_classes}
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = [f"layer{index + 1}" for index in range(len(layers))]
        channels = 64
        for index, (stage, blocks) in enumerate(zip(self.stages, layers)):
            width, out_channels = groups * width_per_group * 2**index, 256 * 2**index
            made = []
            for block in range(blocks):
                made.append(Bottleneck(channels, width, out_channels, stride=2 if index and not block else 1))
                channels = out_channels
            self.add_module(stage, nn.Sequential(*made))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, before the softmax."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.fc(self.avgpool(x).flatten(1))


@register
def g_resnext50(num_classes: int = 1000, in_channels: int = 3, groups: int = 32, width_per_group: int = 4) -> GResNeXt:
    """G-ResNeXt-50 with the widths of ResNeXt-50 32x4d, its 3×3 convolutions dense.

    >>> with torch.device("meta"):
    ...     net = g_resnext50()
    >>> net.layer4[2].conv2
    Conv2d(1024, 1024, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """
    return GResNeXt((3, 4, 6, 3), groups, width_per_group, num_classes, in_channels)


@register
def g_resnext101(num_classes: int = 1000, in_channels: int = 3, groups: int = 32, width_per_group: int = 8) -> GResNeXt:
    """G-ResNeXt-101 with the widths of ResNeXt-101 32x8d, its 3×3 convolutions dense.

    >>> with torch.device("meta"):
    ...     net = g_resnext101()
    >>> len(net.layer3), net.layer4[2].conv2.in_channels
    (23, 2048)
    """
    return GResNeXt((3, 4, 23, 3), groups, width_per_group, num_classes, in_channels)
