"""ACNet: Asymmetric Convolution Blocks (Ding et al., ICCV 2019, arXiv 1908.03930).

Beside the square kernel stand two strips, which add to its middle row and its middle column (section 3.1):

    y = BN(W_{k×k} * x) + BN(W_{k×1} * x) + BN(W_{1×k} * x)

In three dimensions there are three lines through the middle. In one there is nothing to add.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import nn

from ._branched import BranchedMethod, conv_norm
from ._registry import register

_AXES = {2: ("vertical", "horizontal"), 3: ("depth", "vertical", "horizontal")}


@register
@dataclasses.dataclass(frozen=True)
class ACNet(BranchedMethod):
    """ACNet for `expand`: strips through the middle of each kernel of two dimensions or more.

    Args:
        moments: while training on a CPU, compute the strips again backward instead of keeping their maps: the same
            sum, gradients and running statistics. False runs the branches of section 3.1 one by one.

    Source: Ding et al., ICCV 2019, section 3.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        >>> rich = foldconv.expand(net, "acnet")
        >>> [tuple(branch.conv.kernel_size) for branch in rich[0].body.children()]
        [(3, 3), (3, 1), (1, 3)]
    """

    moments: bool = True

    name: ClassVar[str] = "acnet"
    title: ClassVar[str] = "ACNet"
    paper: ClassVar[str] = "Ding et al., ICCV 2019, arXiv 1908.03930"
    adds: ClassVar[str] = "k×1 and 1×k strips, each with a norm"
    gain: ClassVar[str] = "higher on CIFAR and ImageNet for several networks"

    def branches(self, conv: Any, norm: nn.Module | None) -> dict[str, nn.Module]:
        """One strip along each axis."""
        size = conv.kernel_size
        return {
            axis: conv_norm(conv, norm, [k if j == i else 1 for j, k in enumerate(size)])
            for i, axis in enumerate(_AXES[len(size)])
        }

    def reason_against(self, conv: Any, norm: nn.Module | None = None) -> str | None:
        """A strip must differ from the kernel."""
        if sum(k > 1 for k in conv.kernel_size) < 2:
            return f"a strip of its kernel {tuple(conv.kernel_size)} is that kernel again"
        return super().reason_against(conv, norm)
