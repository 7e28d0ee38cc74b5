"""QARepVGG: Make RepVGG Greater Again: A Quantization-aware Approach (Chu et al., AAAI 2024, arXiv 2212.01593).

RepVGG's norms in the 1×1 and identity branches make the variance of the sum, and then the folded weights, explode,
which int8 cannot hold. Here only the k×k branch keeps a norm, and one norm comes after the sum (section 4):

    y = BN( BN(W_{k×k} * x) + W_{1×1} * x + x )
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn

from ..algebra import Sum
from ..formulas import POINT_BESIDE_ONE_TAP, middle
from ..layers import BranchedConv
from ._branched import BranchedMethod, branch_conv, has_identity, norm_like
from ._registry import register


@register
@dataclasses.dataclass(frozen=True)
class QARepVGG(BranchedMethod):
    """QARepVGG for `expand`: the norm that follows the convolution becomes the one after the sum.

    A convolution with a bias and no norm gets the branches alone. ``init="preserve"`` keeps the evaluation function;
    in training mode the inner norm sees the batch at once, so the first steps differ from the plain network's.

    Source: Chu et al., AAAI 2024, section 4.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> rich = foldconv.expand(net, "qarepvgg")
        >>> [name for name, branch in rich[0].body.sum.named_children()]
        ['main', 'point', 'identity']
    """

    name: ClassVar[str] = "qarepvgg"
    title: ClassVar[str] = "QARepVGG"
    paper: ClassVar[str] = "Chu et al., AAAI 2024, arXiv 2212.01593"
    adds: ClassVar[str] = "a bare 1×1 branch and identity, and a norm after the sum"
    gain: ClassVar[str] = "ImageNet top-1 in int8, RepVGG-A0: 52.2 → 70.4"

    def body(self, main: nn.Sequential, conv: Any, norm: nn.Module | None) -> nn.Module:
        """The sum, then the network's own norm."""
        inner = nn.Sequential()
        inner.add_module("conv", conv)
        if norm is not None:
            inner.add_module("norm", norm_like(norm, conv))
        others: dict[str, nn.Module] = {"point": branch_conv(conv, [1] * len(conv.kernel_size))}
        if has_identity(conv):
            others["identity"] = nn.Identity()
        body = nn.Sequential()
        body.add_module("sum", Sum(main=inner, **others))
        if norm is not None:
            body.add_module("norm", main.norm)  # pyright: ignore[reportArgumentType]
        return body

    def silence(self, layer: BranchedConv) -> None:
        """The inner norm passes on, the 1×1 branch is zero, and the k×k kernel makes up for the identity."""
        branches: Any = layer.body.sum
        conv = layer.conv
        if layer.norm is not None:
            layer.norm.reset_parameters()
            layer.norm.running_var.fill_(1 - layer.norm.eps)
        nn.init.zeros_(branches.point.conv.weight)
        if hasattr(branches, "identity"):
            centre = middle(conv.kernel_size)
            rows = torch.arange(conv.out_channels, device=conv.weight.device)
            with torch.no_grad():
                conv.weight[(rows, rows % conv.weight.shape[1], *centre)] -= 1

    def reason_against(self, conv: Any, norm: nn.Module | None = None) -> str | None:
        """A 1×1 kernel gains nothing."""
        if set(conv.kernel_size) == {1}:
            return POINT_BESIDE_ONE_TAP
        return super().reason_against(conv, norm)
