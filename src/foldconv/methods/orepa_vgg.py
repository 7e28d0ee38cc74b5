"""OREPA_VGG: RepVGG whose k×k branch is itself an OREPA (Hu et al., CVPR 2022, table 5).

    y = BN(OREPA * x) + BN(W1 * x) + BN(x)

The OREPA has no 1×1 branch of its own, since one stands beside it (`orepa.py` has its equation and initial values).
Two kinds of method meet: the OREPA kernel is composed while training, the branches around it run on feature maps.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import nn

from ._registry import register
from .orepa import OREPA
from .repvgg import RepVGG


@register
@dataclasses.dataclass(frozen=True)
class OREPAVGG(RepVGG):
    """OREPA_VGG for `expand`; `custom_l2` as in `RepVGG`, on the OREPA's origin branch.

    Source: Hu et al., CVPR 2022, section 4.2.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> rich = foldconv.expand(net, "orepa_vgg")
        >>> type(rich[0].conv).__name__, [name for name, branch in rich[0].body.named_children()]
        ('OREPAConv2d', ['main', 'point', 'identity'])
    """

    name: ClassVar[str] = "orepa_vgg"
    title: ClassVar[str] = "OREPA_VGG"
    paper: ClassVar[str] = "Hu et al., CVPR 2022, arXiv 2204.00826"
    adds: ClassVar[str] = "RepVGG's branches around an OREPA kernel"
    gain: ClassVar[str] = "ImageNet top-1, RepVGG-A0: 72.41 → 73.04"

    def main_conv(self, conv: Any) -> Any:
        """An OREPA without its 1×1 branch."""
        return OREPA(point=False).expand(super().main_conv(conv))

    def reason_against(self, conv: Any, norm: nn.Module | None = None) -> str | None:
        """What RepVGG or OREPA refuses."""
        return super().reason_against(conv, norm) or OREPA(point=False).reason_against(conv)
