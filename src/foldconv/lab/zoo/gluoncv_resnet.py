"""GluonCV's ResNets v1, v1b and v2, which DO-Conv's ImageNet table was measured with.

Origin: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (v1), and "Identity Mappings in Deep
Residual Networks", ECCV 2016 (v2), as GluonCV defines them (``gluoncv/model_zoo/resnet.py``, the same as MXNet's
``gluon.model_zoo.vision``, and ``resnetv1b.py``):

* v1: a bottleneck has its stride in its first 1×1, as in the paper, and biases in both 1×1, as nowhere else.
* v1b: the stride is in the 3×3, no biases: what torchvision calls ResNet, under the same names of modules.
* v2: norm and rectifier before each convolution; a norm without scale and shift on the images.

Modules are named as in GluonCV's parameter files. The names begin with ``gluoncv_`` since timm knows
``gluon_resnet50_v1b`` and the like as old names of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import UnsupportedError
from ._registry import register


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=bias)


class BlockV1(nn.Module):
    """``body`` and shortcut, then the rectifier: (batch, in, h, w) → (batch, out, h/stride, w/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, bottleneck: bool):
        super().__init__()
        if bottleneck:
            inner = out_channels // 4
            layers: list[nn.Module] = [
                _conv(in_channels, inner, 1, stride, bias=True),
                nn.BatchNorm2d(inner),
                nn.ReLU(inplace=True),
                _conv(inner, inner, 3),
                nn.BatchNorm2d(inner),
                nn.ReLU(inplace=True),
                _conv(inner, out_channels, 1, bias=True),
            ]
        else:
            layers = [
                _conv(in_channels, out_channels, 3, stride),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
                _conv(out_channels, out_channels, 3),
            ]
        self.last_norm = f"body.{len(layers)}"
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(out_channels))
        self.downsample: nn.Module | None = None
        if in_channels != out_channels:
            self.downsample = nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual sum, then the rectifier."""
        return F.relu(self.body(x) + (x if self.downsample is None else self.downsample(x)))


class BlockV1b(nn.Module):
    """torchvision's blocks: (batch, in, h, w) → (batch, out, h/stride, w/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, bottleneck: bool):
        super().__init__()
        self.bottleneck = bottleneck
        inner = out_channels // 4 if bottleneck else out_channels
        self.conv1 = _conv(in_channels, inner, 1) if bottleneck else _conv(in_channels, inner, 3, stride)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, inner, 3, stride if bottleneck else 1)
        self.bn2 = nn.BatchNorm2d(inner)
        if bottleneck:
            self.conv3 = _conv(inner, out_channels, 1)
            self.bn3 = nn.BatchNorm2d(out_channels)
        self.last_norm = "bn3" if bottleneck else "bn2"
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual sum, then the rectifier."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class BlockV2(nn.Module):
    """Norm and rectifier before each convolution: (batch, in, h, w) → (batch, out, h/stride, w/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, bottleneck: bool):
        super().__init__()
        self.bottleneck = bottleneck
        inner = out_channels // 4 if bottleneck else out_channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, inner, 1) if bottleneck else _conv(in_channels, inner, 3, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, inner, 3, stride if bottleneck else 1)
        if bottleneck:
            self.bn3 = nn.BatchNorm2d(inner)
            self.conv3 = _conv(inner, out_channels, 1)
        self.downsample: nn.Module | None = None
        if in_channels != out_channels:
            self.downsample = _conv(in_channels, out_channels, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual sum; the shortcut begins behind the first rectifier where it has a convolution."""
        y = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        if self.bottleneck:
            y = self.conv3(F.relu(self.bn3(y)))
        return y + shortcut


class GluonCVResNet(nn.Module):
    """The family: images (batch, in_channels, h, w) → logits (batch, num_classes).

    Args:
        version: ``"v1"``, ``"v1b"`` or ``"v2"``.
        depths: blocks in each of the four stages.
        bottleneck: blocks of 1×1, 3×3 and 1×1 with four times the channels at their end, instead of two 3×3.
        width: channels of the stem; the 3×3 of the stages have 1, 2, 4 and 8 times as many.
        num_classes: number of logits.
        in_channels: channels of the images.
        last_gamma: start every block as its shortcut, by zeros in its last norm (GluonCV's recipes ask for it).

    Raises:
        UnsupportedError: an unknown version, other than four stages, an empty one, or `last_gamma` for v2.

    >>> net = GluonCVResNet("v2", (1, 1, 1, 1), bottleneck=True, width=8, num_classes=10)
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        version: str = "v1",
        depths: Sequence[int] = (2, 2, 2, 2),
        bottleneck: bool = False,
        width: int = 64,
        num_classes: int = 1000,
        in_channels: int = 3,
        last_gamma: bool = False,
    ):
        super().__init__()
        if version not in _BLOCKS:
            raise UnsupportedError(f"version: expected one of {', '.join(_BLOCKS)}, received {version!r}")
        if len(depths) != 4 or min(depths) < 1:
            raise UnsupportedError(f"depths: expected four stages of at least one block, received {depths}")
        if last_gamma and version == "v2":
            # GluonCV takes the option, and its blocks stay zero: the norm's rectifier passes no gradient at zero.
            raise UnsupportedError(
                "last_gamma=True would keep the blocks of v2 at zero for ever, since a rectifier follows their last "
                "norm; use v1 or v1b, or leave it out"
            )
        self.default_cfg = {"input_size": (in_channels, 224, 224), "num_classes": num_classes}
        stem = [_conv(in_channels, width, 7, stride=2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        stages, channels = [], width
        for stage, depth in enumerate(depths):
            blocks, out_channels = nn.Sequential(), width * 2**stage * (4 if bottleneck else 1)
            for block in range(depth):
                blocks.append(_BLOCKS[version](channels, out_channels, 2 if stage and not block else 1, bottleneck))
                channels = out_channels
            stages.append(blocks)
        self.flat = version == "v1b"
        if self.flat:
            self.conv1, self.bn1, self.relu, self.maxpool = stem
            self.layer1, self.layer2, self.layer3, self.layer4 = stages
            self.fc = nn.Linear(channels, num_classes)
        else:
            before = [nn.BatchNorm2d(in_channels, affine=False)] if version == "v2" else []
            after = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)] if version == "v2" else []
            self.features = nn.Sequential(*before, *stem, *stages, *after, nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.output = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif last_gamma and isinstance(module, (BlockV1, BlockV1b)):
                nn.init.zeros_(module.get_parameter(f"{module.last_norm}.weight"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, before the softmax."""
        if not self.flat:
            return self.output(self.features(x))
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


_BLOCKS: dict[str, Callable[[int, int, int, bool], nn.Module]] = {"v1": BlockV1, "v1b": BlockV1b, "v2": BlockV2}
_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _builder(version: str, depth: int) -> Callable[..., nn.Module]:
    def build(
        num_classes: int = 1000, in_channels: int = 3, width: int = 64, last_gamma: bool = False
    ) -> GluonCVResNet:
        return GluonCVResNet(version, _DEPTHS[depth], depth >= 50, width, num_classes, in_channels, last_gamma)

    build.__name__ = f"gluoncv_resnet{depth}_{version}"
    build.__doc__ = f"GluonCV's ResNet-{depth} {version}."
    return build


for _version in _BLOCKS:
    for _depth in _DEPTHS:
        register(_builder(_version, _depth))
