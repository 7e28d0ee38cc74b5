"""ExpandNets (Guo, Alvarez, Salzmann, "ExpandNets: Linear Over-parameterization to Train Compact Convolutional
Networks", NeurIPS 2020).

A convolution from I to O channels becomes several without anything between them, r times as wide inside:

    CL    1×1 (I → rI),  k×k (rI → rO),  1×1 (rO → O)
    CK    3×3 (I → rI),  ...,  3×3 (→ O):   (k - 1) / 2 of them, for odd k ≥ 5

As in the original all padding is in the first layer and the stride in the last that has taps, so that the chain is one
k×k convolution at the borders too. The inner widths of CK are rI, and rO before the last when there are three or more
(the original's networks for k = 5 and 7; longer chains continue that). A rectangular kernel takes fewer taps in its
shorter dimension. Biases inside the chain would add up to one bias, which is what the layer has.

Starting from a trained kernel K: CL draws the pointwise factors with orthonormal columns and rows and solves for the
middle one, ``F_2 = F_3⁺ K F_1⁺``, which is exact for every r ≥ 1 and has K's norm. They are drawn as blocks on the
diagonal, which saves most of the arithmetic: by gradient descent (with momentum, weight decay) K then learns the same
whichever orthonormal factors are drawn, for a rotation between two factors changes neither their product, nor its
gradient, nor any norm. CK cuts K into pieces
(`foldconv.layers.factored.hold`): exact from r = 4 for k ≤ 10 in two dimensions; where the width does not suffice,
it refuses and says what would.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..layers import Foldable
from ..layers.factored import FactoredConv, stack_sizes
from ..layers.foldable import plain_class
from ._registry import Init, Method, register

Chain = Literal["CL", "CK"]


class _ExpandNetNd(FactoredConv):
    """All of ExpandNets, for any number of dimensions; the rank classes only pin the base.

    Args:
        rate: r, how many times as wide the layers inside are; an integer ≥ 1.
        chain: ``"CL"`` (1×1, k×k, 1×1) or ``"CK"`` (stacked 3×3).

    Shapes:
        input, output and ``bias`` as in the plain layer; ``factor0``, ``factor1``, ...:
        ``(width, previous width / groups, *taps)``; ``weight``, the composed kernel in the plain shape, can only be
        read (`start_from` sets it).

    Raises:
        UnsupportedError: for a rate below 1, another chain, one tap (CL), or even sizes or none of at least 5 (CK).

    Source: Guo et al., "ExpandNets", NeurIPS 2020, section 3 (CL and CK).
    """

    rate: int
    chain: Chain

    def __init__(self, *args: Any, rate: int = 4, chain: Chain = "CL", **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(rate, int) or isinstance(rate, bool) or rate < 1:
            raise UnsupportedError(f"rate: expected an integer ≥ 1, received {rate!r}")
        if chain not in ("CL", "CK"):
            raise UnsupportedError(f"chain: expected 'CL' or 'CK', received {chain!r}")
        reason = _reason(chain, self.kernel_size)
        if reason is not None:
            raise UnsupportedError(reason)
        self.rate, self.chain = rate, chain
        point = (1,) * len(self.kernel_size)
        inside = (rate * self.in_channels, rate * self.out_channels)
        if chain == "CL":
            sizes, widths = [point, self.kernel_size, point], list(inside)
        else:
            sizes = stack_sizes(self.kernel_size)
            widths = [inside[0]] * (len(sizes) - 1)
            if len(sizes) > 2:
                widths[-1] = inside[1]
        outs, ins = [*widths, self.out_channels], [self.in_channels, *widths]
        shapes = [(o, i // self.groups, *size) for o, i, size in zip(outs, ins, sizes)]
        self.build(shapes, {f"factor{n}": shape for n, shape in enumerate(shapes)})

    def reset_extra_parameters(self) -> None:
        """CL: pointwise factors with orthonormal columns (the first) and rows (the last) in each group; CK: drawn."""
        if self.chain == "CK":
            self.draw()
            return
        first, last = (getattr(self, name) for name in ("factor0", "factor2"))
        _orthonormal(first, self.groups, transposed=False)
        _orthonormal(last, self.groups, transposed=True)

    @torch.no_grad()
    def start_from(self, kernel: Tensor) -> None:
        """Become the plain convolution with this kernel; what the factors had learned is forgotten.

        CL: the pointwise factors are drawn, the middle one is solved for, a block of its inputs at a time.

        Raises:
            UnsupportedError: CK, when the widths do not suffice.
        """
        if self.chain == "CK":
            super().start_from(kernel)
            return
        self.reset_extra_parameters()
        if self.factor1.is_meta or kernel.is_meta:
            return
        # Pseudo-inverses of what is stored, so that rounding the factors to their dtype costs no exactness.
        before, after = (getattr(self, name).detach().to("cpu", torch.float64) for name in ("factor0", "factor2"))
        before = _blocks_of(before.reshape(self.groups, -1, before.shape[1]))  # (g, q, r·n, n): of full column rank
        after = _blocks_of(after.reshape(self.groups, -1, after.shape[1]).mT)  # (g, p, r·m, m)
        right = before @ torch.linalg.inv(before.mT @ before)
        left = after @ torch.linalg.inv(after.mT @ after)
        (_, q, wide_n, n), (_, p, wide_m, m) = before.shape, after.shape
        found = kernel.detach().to("cpu", torch.float64).reshape(self.groups, p, m, q, n, -1)
        # (groups, p, r·m, q, r·n, *taps): splitting dimensions is a view in every memory format.
        factor: Any = self.factor1
        middle = factor.unflatten(1, (q, wide_n)).unflatten(0, (self.groups, p, wide_m))
        for i in range(q):
            # Σ_n right[y, n] K[m, n, t], then Σ_m left[x, m] of that: in the order in which it is stored.
            taps = right[:, None, None, i] @ found[:, :, :, i]
            solved = left @ taps.flatten(3)  # (g, p, r·m, r·n·t)
            middle[:, :, :, i].copy_(solved.unflatten(3, (wide_n, *self.kernel_size)))

    @property
    def method(self) -> ExpandNet:
        """The config that rebuilds this layer."""
        return ExpandNet(self.rate, self.chain)

    def extra_repr(self) -> str:
        """torch's description and the method's options."""
        return f"{super().extra_repr()}, rate={self.rate}, chain={self.chain!r}"


BLOCK = 16
"""Channels that a block of a drawn pointwise factor mixes, at most; fewer than 8 make no block."""


def _blocks(channels: int) -> int:
    """Into how many blocks of equal size the channels of a group are cut.

    >>> _blocks(24), _blocks(512), _blocks(37)
    (2, 32, 1)
    """
    size = max(n for n in range(1, BLOCK + 1) if channels % n == 0)
    return channels // size if size >= 8 else 1


def _blocks_of(factor: Tensor) -> Tensor:
    """The blocks of block-diagonal matrices, ``(g, r·n, n)``, as ``(g, blocks, r·n / blocks, n / blocks)``; a view."""
    blocks = _blocks(factor.shape[2])
    split = factor.unflatten(2, (blocks, -1)).unflatten(1, (blocks, -1))  # (g, p, x, p, i)
    return split.diagonal(dim1=1, dim2=3).movedim(-1, 1)


@torch.no_grad()
def _orthonormal(factor: Tensor, groups: int, transposed: bool) -> None:
    """Fill a pointwise factor with random blocks of orthonormal columns (or rows) per group."""
    if factor.is_meta:
        return
    columns = torch.zeros(groups, factor.shape[0] // groups, factor.shape[1], dtype=torch.float64)
    blocks = _blocks_of(columns.mT if transposed else columns)
    blocks.copy_(torch.linalg.qr(torch.randn(blocks.shape, dtype=torch.float64)).Q)
    factor.copy_(columns.reshape(factor.shape))


def _reason(chain: str, kernel_size: Sequence[int]) -> str | None:
    """Why a kernel of this size is not expanded."""
    size = tuple(kernel_size)
    if chain == "CK" and (max(size) < 5 or any(k % 2 == 0 for k in size)):
        return f"ExpandNet-CK stacks kernels of 3 taps, which needs odd sizes, one of at least 5; its size is {size}"
    if math.prod(size) == 1:
        return "its kernel has one tap; ExpandNet-CL puts pointwise layers around a kernel of more"
    return None


class ExpandNetConv1d(_ExpandNetNd, nn.Conv1d):
    """``nn.Conv1d`` that trains as a chain of convolutions."""


class ExpandNetConv2d(_ExpandNetNd, nn.Conv2d):
    """``nn.Conv2d`` that trains as a chain of convolutions.

    Example:
        >>> layer = ExpandNetConv2d(4, 8, 5, padding=2, chain="CK")
        >>> [tuple(p.shape) for name, p in layer.named_parameters() if name != "bias"]
        [(16, 4, 3, 3), (8, 16, 3, 3)]
        >>> x = torch.randn(1, 4, 6, 6)
        >>> torch.allclose(layer(x), layer.fold()(x), atol=1e-5)
        True
    """


class ExpandNetConv3d(_ExpandNetNd, nn.Conv3d):
    """``nn.Conv3d`` that trains as a chain of convolutions."""


@register
@dataclasses.dataclass(frozen=True)
class ExpandNet(Method):
    """ExpandNets for `expand`. The convolution's own weight is not kept as a parameter; an optimizer has to be rebuilt.

    Args:
        rate: how many times as wide the layers inside are.
        chain: ``"CL"`` or ``"CK"``; CK leaves kernels below 5 alone, expand those with CL.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> net = foldconv.expand(net, foldconv.ExpandNet(chain="CK"))
        >>> foldconv.expand(net, "expandnet")
        Sequential(
          (0): ExpandNetConv2d(3, 8, kernel_size=(5, 5), stride=(1, 1), rate=4, chain='CK')
          (1): ReLU()
          (2): ExpandNetConv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), rate=4, chain='CL')
        )
    """

    rate: int = 4
    chain: Chain = "CL"

    name: ClassVar[str] = "expandnet"
    title: ClassVar[str] = "ExpandNets"
    paper: ClassVar[str] = "Guo et al., NeurIPS 2020, arXiv 1811.10495"
    adds: ClassVar[str] = "wide layers before and behind (CL), or a stack of 3×3 instead of k×k (CK)"
    gain: ClassVar[str] = "CIFAR-10 top-1, small net of 7×7 kernels: 78.63 → 80.27 (CK)"
    kind: ClassVar[Literal["composable", "statistical"]] = "composable"

    def reason_against(self, conv: nn.Module, norm: nn.Module | None = None) -> str | None:
        """Transposed convolutions and sizes that the chain cannot build."""
        if plain_class(conv) not in _ExpandNetNd.ranks:
            return "ExpandNets chains convolutions that gather; a transposed one scatters"
        return _reason(self.chain, conv.kernel_size)  # pyright: ignore

    def expand(self, conv: nn.Module, init: Init = "preserve", norm: nn.Module | None = None) -> Foldable:
        """The chain in `conv`'s place; ``init="paper"`` draws each factor like torch's convolutions."""
        return _ExpandNetNd.from_conv(conv, init, **dataclasses.asdict(self))
