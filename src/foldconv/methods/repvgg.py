"""RepVGG: Making VGG-style ConvNets Great Again (Ding et al., CVPR 2021, arXiv 2101.03697).

While training, each 3×3 convolution with its norm gets two companions (section 3.2):

    y = BN(W3 * x) + BN(W1 * x) + BN(x)

a 1×1 convolution and, where input and output have one shape, the input itself. In evaluation mode each term is a
convolution with bias, so their sum is one (section 3.3).

The custom weight decay of the original code is a penalty on the *folded* kernel: its centre, scaled as the norms
scale it, plus the plain L2 of the rest (field name: custom L2).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..algebra.norms import scale_and_shift
from ..formulas import POINT_BESIDE_ONE_TAP, middle
from ..layers import BranchedConv
from ._branched import BranchedMethod, conv_norm, identity_norm
from ._registry import register


@register
@dataclasses.dataclass(frozen=True)
class RepVGG(BranchedMethod):
    """RepVGG for `expand`: 1×1 and identity branches with norms beside each convolution of more than one tap.

    Args:
        custom_l2: factor of the penalty on the folded kernel that `foldconv.regularization` returns (0: none). With
            it, the weight decay of the k×k and 1×1 kernels is meant to be zero.
        moments: while training on a CPU, compute the 1×1 branch and the identity as one convolution, from the moments
            of their input (ops/_moments.py derives it): the same sum, gradients and running statistics without a map
            per branch. False always runs the branches of section 3.2 one by one.

    Source: Ding et al., CVPR 2021, section 3.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> rich = foldconv.expand(net, "repvgg")
        >>> [name for name, branch in rich[0].body.named_children()]
        ['main', 'point', 'identity']
        >>> foldconv.fold(rich)
        Sequential(
          (0): Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
          (1): BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
          (2): ReLU()
        )
    """

    custom_l2: float = 0.0
    moments: bool = True

    name: ClassVar[str] = "repvgg"
    title: ClassVar[str] = "RepVGG"
    paper: ClassVar[str] = "Ding et al., CVPR 2021, arXiv 2101.03697"
    adds: ClassVar[str] = "a 1×1 branch and an identity, each with a norm"
    gain: ClassVar[str] = "ImageNet top-1, RepVGG-A0: 72.41"

    def branches(self, conv: Any, norm: nn.Module | None) -> dict[str, nn.Module]:
        """1×1 and identity."""
        return {"point": conv_norm(conv, norm, [1] * len(conv.kernel_size)), **identity_norm(conv, norm)}

    def reason_against(self, conv: Any, norm: nn.Module | None = None) -> str | None:
        """A 1×1 kernel gains nothing from a second one."""
        if set(conv.kernel_size) == {1}:
            return POINT_BESIDE_ONE_TAP
        return super().reason_against(conv, norm)

    def penalty(self, layer: BranchedConv) -> Tensor | None:
        """Half the squared norm of the folded kernel, centre and rest, as the original's custom L2.

        The centre of the k×k kernel and the 1×1 kernel count together, as the fold has them; each entry is divided
        by the norms' scales (detached), so that the norms do not feel it.
        """
        if not self.custom_l2:
            return None
        body: Any = layer.body
        k3, k1 = body.main.conv.weight, body.point.conv.weight
        if layer.norm is None:
            s3, s1 = k3.new_ones(k3.shape[0]), scale_and_shift(body.point.norm, k3.dtype)[0].detach()
        else:
            s3, s1 = (scale_and_shift(n, k3.dtype)[0].detach() for n in (body.main.norm, body.point.norm))
        shape = (-1, *[1] * (k3.dim() - 1))
        s3, s1 = s3.reshape(shape), s1.reshape(shape)
        centre = k3[(..., *(slice(m, m + 1) for m in middle(k3.shape[2:])))]
        rest = (k3**2).sum() - (centre**2).sum()
        # Both scales may be zero: then the fold has no centre to penalize.
        folded = (centre * s3 + k1 * s1) ** 2 / (s3**2 + s1**2).clamp_min(torch.finfo(k3.dtype).tiny)
        return self.custom_l2 * 0.5 * (rest + folded.sum())
