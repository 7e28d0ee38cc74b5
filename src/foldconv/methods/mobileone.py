"""MobileOne: An Improved One Millisecond Mobile Backbone (Vasu et al., CVPR 2023, arXiv 2206.04040).

Each convolution trains as several copies of itself beside a scale branch and an identity (section 3.2, figure 3):

    y = Σ_{n=1..N} BN_n(W_n * x)  +  BN(W_{1×1} * x)  +  BN(x)

The 1×1 branch is there for kernels of more than one tap, the identity where input and output have one shape.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import nn

from ..errors import UnsupportedError, shown
from ._branched import BranchedMethod, conv_norm, has_identity, identity_norm
from ._registry import register

_MOST = 1000  # copies; the paper has up to four


@register
@dataclasses.dataclass(frozen=True)
class MobileOne(BranchedMethod):
    """MobileOne for `expand`.

    Args:
        conv_branches: N, k×k branches including the convolution itself; the paper's S0 has 4, its larger nets 1.
        moments: while training on a CPU, compute branches of one tap and the identity as one convolution, from the
            moments of their input (ops/_moments.py derives it), run the copies as one convolution (ops/_copies.py) and
            compute most of them again backward instead of keeping their maps: the same sum, gradients and running
            statistics. False runs the branches of figure 3 one by one.

    Raises:
        UnsupportedError: for fewer than one branch.

    Source: Vasu et al., CVPR 2023, section 3.2.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8))
        >>> rich = foldconv.expand(net, foldconv.MobileOne(conv_branches=2))
        >>> [name for name, branch in rich[0].body.named_children()]
        ['main', 'conv2', 'scale', 'identity']
    """

    conv_branches: int = 4
    moments: bool = True

    name: ClassVar[str] = "mobileone"
    title: ClassVar[str] = "MobileOne"
    paper: ClassVar[str] = "Vasu et al., CVPR 2023, arXiv 2206.04040"
    adds: ClassVar[str] = "copies of the convolution, a 1×1 branch and an identity, each with a norm"
    gain: ClassVar[str] = "ImageNet top-1, MobileOne-S0: 71.4"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.conv_branches) is not int or not 1 <= self.conv_branches <= _MOST:
            raise UnsupportedError(
                f"conv_branches: expected an integer from 1 to {_MOST}, received {shown(self.conv_branches)}"
            )

    def branches(self, conv: Any, norm: nn.Module | None) -> dict[str, nn.Module]:
        """Copies, scale and identity."""
        size = conv.kernel_size
        copies = {f"conv{n}": conv_norm(conv, norm, size) for n in range(2, self.conv_branches + 1)}
        scale = {} if set(size) == {1} else {"scale": conv_norm(conv, norm, [1] * len(size))}
        return {**copies, **scale, **identity_norm(conv, norm)}

    def reason_against(self, conv: Any, norm: nn.Module | None = None) -> str | None:
        """With one branch, a 1×1 kernel and no identity nothing would be added."""
        if self.conv_branches == 1 and set(conv.kernel_size) == {1} and not has_identity(conv):
            return "conv_branches=1 adds nothing to a kernel of one tap without an identity"
        return super().reason_against(conv, norm)
