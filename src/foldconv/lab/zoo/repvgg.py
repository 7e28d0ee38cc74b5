"""RepVGG as the plain network that is expanded, and that comes out of folding.

Origin: X. Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, arXiv 2101.03697, table 2 and
section 3.4: 3×3 convolutions with norm and rectifier and nothing else, five stages that each halve the resolution,
global average pooling, one linear layer. The variants g2 and g4 group every second convolution.

    net = foldconv.expand(foldconv.zoo.create("plain_repvgg_a0"), "repvgg", init="paper")

Stages are named as in the published code, whose checkpoints `import_checkpoint(..., source="repvgg")` reads. The names
begin with ``plain_`` because timm's ``repvgg_a0`` is the network with its branches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...errors import UnsupportedError
from ._conv_norm import conv_norm
from ._registry import register


class RepVGG(nn.Module):
    """The family: images (batch, in_channels, h, w) → logits (batch, num_classes).

    Args:
        depths: convolutions in each of the four stages behind the first convolution.
        widths: their channels, in units of 64, 128, 256 and 512.
        groups: groups of every second convolution (the third of the network is the first of them).
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        UnsupportedError: for other than four stages, or an empty one.

    >>> RepVGG((1, 1, 1, 1), (0.125, 0.125, 0.125, 0.125), num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 4, 14, 1),
        widths: Sequence[float] = (0.75, 0.75, 0.75, 2.5),
        groups: int = 1,
        num_classes: int = 1000,
        in_channels: int = 3,
    ):
        super().__init__()
        if len(depths) != 4 or len(widths) != 4 or min(depths) < 1:
            raise UnsupportedError(
                f"expected four stages of at least one convolution, received depths {depths} and widths {widths}"
            )
        self.default_cfg = {"input_size": (in_channels, 224, 224), "num_classes": num_classes}
        channels = min(64, int(64 * widths[0]))
        self.stage0 = conv_norm(in_channels, channels, 3, stride=2)
        index = 1
        for stage, (depth, width) in enumerate(zip(depths, widths)):
            out_channels = int(64 * 2**stage * width)
            blocks = nn.Sequential()
            for block in range(depth):
                grouped = groups if index % 2 == 0 else 1
                blocks.append(conv_norm(channels, out_channels, 3, stride=1 if block else 2, groups=grouped))
                channels, index = out_channels, index + 1
            self.add_module(f"stage{stage + 1}", blocks)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, before the softmax."""
        for stage in range(5):
            x = self.get_submodule(f"stage{stage}")(x)
        return self.linear(self.gap(x).flatten(1))


_A, _B = (2, 4, 14, 1), (4, 6, 16, 1)
_VARIANTS: dict[str, tuple[Sequence[int], Sequence[float], int]] = {
    "a0": (_A, (0.75, 0.75, 0.75, 2.5), 1),
    "a1": (_A, (1, 1, 1, 2.5), 1),
    "a2": (_A, (1.5, 1.5, 1.5, 2.75), 1),
    "b0": (_B, (1, 1, 1, 2.5), 1),
    "b1": (_B, (2, 2, 2, 4), 1),
    "b1g2": (_B, (2, 2, 2, 4), 2),
    "b1g4": (_B, (2, 2, 2, 4), 4),
    "b2": (_B, (2.5, 2.5, 2.5, 5), 1),
    "b2g2": (_B, (2.5, 2.5, 2.5, 5), 2),
    "b2g4": (_B, (2.5, 2.5, 2.5, 5), 4),
    "b3": (_B, (3, 3, 3, 5), 1),
    "b3g2": (_B, (3, 3, 3, 5), 2),
    "b3g4": (_B, (3, 3, 3, 5), 4),
}


def _register(variant: str, depths: Sequence[int], widths: Sequence[float], groups: int) -> None:
    def build(
        num_classes: int = 1000,
        in_channels: int = 3,
        depths: Sequence[int] = depths,
        widths: Sequence[float] = widths,
        groups: int = groups,
    ) -> RepVGG:
        return RepVGG(depths, widths, groups, num_classes, in_channels)

    build.__name__ = f"plain_repvgg_{variant}"
    build.__doc__ = f"RepVGG-{variant.upper()} without branches."
    register(build)


for _variant, _default in _VARIANTS.items():
    _register(_variant, *_default)
