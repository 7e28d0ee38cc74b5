"""The ResNets of OREPA's and DBB's published code, as the plain networks that are expanded.

Origin: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1, with the stride of a
bottleneck in its 3×3; ResNeXt: S. Xie et al., CVPR 2017; widths 1.5 and 2: M. Hu et al., "Online Convolutional
Re-parameterization", CVPR 2022, table 2. They compute what torchvision's do. Their modules are named as in the
published code, whose checkpoints `import_checkpoint` reads (``source="orepa"`` or ``"dbb"``):

    stage0.conv1, stage1.0.conv1 ... stage4.1.conv2, shortcut     each a convolution ``conv`` and its norm ``bn``
    linear

In the paper the convolutions of ResNet-18 and 34 are replaced but for the shortcuts, those of the deeper ones all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import UnsupportedError
from ._conv_norm import conv_norm
from ._registry import register


class Block(nn.Module):
    """A residual block: (batch, in, h, w) → (batch, out, h/stride, w/stride).

    Args:
        in_channels, out_channels: of the block.
        stride: of its first 3×3.
        width: channels of the 3×3 of a bottleneck; None for two 3×3 of `out_channels`.
        groups: of the 3×3 of a bottleneck.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, width: int | None, groups: int):
        super().__init__()
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv_norm(in_channels, out_channels, 1, stride, relu=False)
        if width is None:
            self.conv1 = conv_norm(in_channels, out_channels, 3, stride)
            self.conv2 = conv_norm(out_channels, out_channels, 3, relu=False)
        else:
            self.conv1 = conv_norm(in_channels, width, 1)
            self.conv2 = conv_norm(width, width, 3, stride, groups)
            self.conv3 = conv_norm(width, out_channels, 1, relu=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual sum, then the rectifier."""
        y = self.conv2(self.conv1(x))
        if hasattr(self, "conv3"):
            y = self.conv3(y)
        return F.relu(y + self.shortcut(x))


class OREPAResNet(nn.Module):
    """The family: images (batch, in_channels, h, w) → logits (batch, num_classes).

    Args:
        depths: blocks in each of the four stages.
        width: factor on the channels, 64 in the first stage and twice as many in each later one.
        bottleneck: blocks of 1×1, 3×3 and 1×1 with four times the channels at their end, instead of two 3×3.
        groups: groups of the 3×3 of bottlenecks (ResNeXt's cardinality); 1 for a ResNet.
        width_per_group: channels of such a group in the first stage, twice as many in each later one.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        UnsupportedError: for other than four stages, an empty one, or groups without bottlenecks.

    >>> OREPAResNet((1, 1, 1, 1), width=0.125, num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 2, 2),
        width: float = 1.0,
        bottleneck: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        num_classes: int = 1000,
        in_channels: int = 3,
    ):
        super().__init__()
        if len(depths) != 4 or min(depths) < 1:
            raise UnsupportedError(f"depths: expected four stages of at least one block, received {depths}")
        if groups > 1 and not bottleneck:
            raise UnsupportedError(f"groups={groups} is for the 3×3 of bottlenecks; pass bottleneck=True")
        self.default_cfg = {"input_size": (in_channels, 224, 224), "num_classes": num_classes}
        channels = int(64 * width)
        self.stage0 = nn.Sequential()
        self.stage0.add_module("conv1", conv_norm(in_channels, channels, 7, stride=2))
        self.stage0.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
        for stage, depth in enumerate(depths):
            planes = int(64 * 2**stage * width)
            inner = groups * (planes * width_per_group // 64) if bottleneck else None
            out_channels, blocks = planes * (4 if bottleneck else 1), nn.Sequential()
            for block in range(depth):
                blocks.append(Block(channels, out_channels, 2 if stage and not block else 1, inner, groups))
                channels = out_channels
            self.add_module(f"stage{stage + 1}", blocks)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, before the softmax."""
        for stage in range(5):
            x = self.get_submodule(f"stage{stage}")(x)
        return self.linear(self.gap(x).flatten(1))


@register
def orepa_resnet18(
    num_classes: int = 1000, in_channels: int = 3, depths: Sequence[int] = (2, 2, 2, 2), width: float = 1.0
) -> OREPAResNet:
    """ResNet-18; ``width=1.5`` and ``width=2`` are the paper's wide ones (ResNet-18-2x)."""
    return OREPAResNet(depths, width, num_classes=num_classes, in_channels=in_channels)


@register
def orepa_resnet34(num_classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> OREPAResNet:
    """ResNet-34."""
    return OREPAResNet((3, 4, 6, 3), width, num_classes=num_classes, in_channels=in_channels)


@register
def orepa_resnet50(
    num_classes: int = 1000, in_channels: int = 3, depths: Sequence[int] = (3, 4, 6, 3), width: float = 1.0
) -> OREPAResNet:
    """ResNet-50."""
    return OREPAResNet(depths, width, True, num_classes=num_classes, in_channels=in_channels)


@register
def orepa_resnet101(num_classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> OREPAResNet:
    """ResNet-101."""
    return OREPAResNet((3, 4, 23, 3), width, True, num_classes=num_classes, in_channels=in_channels)


@register
def orepa_resnext50(num_classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> OREPAResNet:
    """ResNeXt-50 32x4d."""
    return OREPAResNet((3, 4, 6, 3), width, True, 32, 4, num_classes, in_channels)
