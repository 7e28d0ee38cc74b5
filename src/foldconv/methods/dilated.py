"""UniRepLKNet's dilated re-parameterization (Ding et al., CVPR 2024, arXiv 2311.15599, section 3.1).

A large depthwise kernel trains beside small ones with growing dilation; a small kernel of k taps and dilation r is a
large one of ``r·(k - 1) + 1`` taps with zeros between:

    y = BN(W_{K×K} * x) + Σ_i BN_i(W_i *_{r_i} x)
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import nn

from ..errors import UnsupportedError, shown
from ._branched import BranchedMethod, conv_norm
from ._registry import register

# Kernel size: sizes and dilations of the small kernels, as published.
_PUBLISHED: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    17: ((5, 9, 3, 3, 3), (1, 2, 4, 5, 7)),
    15: ((5, 7, 3, 3, 3), (1, 2, 3, 5, 7)),
    13: ((5, 7, 3, 3, 3), (1, 2, 3, 4, 5)),
    11: ((5, 5, 3, 3, 3), (1, 2, 3, 4, 5)),
    9: ((5, 5, 3, 3), (1, 2, 3, 4)),
    7: ((5, 3, 3), (1, 2, 3)),
    5: ((3, 3), (1, 2)),
}


@register
@dataclasses.dataclass(frozen=True)
class Dilated(BranchedMethod):
    """UniRepLKNet's dilated branches for `expand`.

    Args:
        kernel_sizes, dilations: the small kernels for every convolution; None: the paper's, by kernel size (5 to 17).
        depthwise_only: leave convolutions that are not depthwise as they are, as the paper does.
        moments: while training on a CPU, compute the small kernels again backward instead of keeping their maps: the
            same sum, gradients and running statistics. False runs the branches of section 3.1 one by one.

    Raises:
        UnsupportedError: for lists of different lengths, or only one of them.

    Source: Ding et al., CVPR 2024, section 3.1 and the published code's table.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8, bias=False), nn.BatchNorm2d(8))
        >>> rich = foldconv.expand(net, "dilated")
        >>> [name for name, branch in rich[0].body.named_children()]
        ['main', 'kernel5_dilation1', 'kernel3_dilation2', 'kernel3_dilation3']
    """

    kernel_sizes: tuple[int, ...] | None = None
    dilations: tuple[int, ...] | None = None
    depthwise_only: bool = True
    moments: bool = True

    name: ClassVar[str] = "dilated"
    title: ClassVar[str] = "UniRepLKNet"
    paper: ClassVar[str] = "Ding et al., CVPR 2024, arXiv 2311.15599"
    adds: ClassVar[str] = "small dilated kernels beside a large depthwise one, each with a norm"
    gain: ClassVar[str] = "not reported apart from the architecture"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.depthwise_only, bool):
            raise UnsupportedError(f"depthwise_only: expected True or False, received {shown(self.depthwise_only)}")
        for name in ("kernel_sizes", "dilations"):
            # JSON has lists; a frozen config compares by value.
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (tuple, list)) and all(type(n) is int for n in value)):
                raise UnsupportedError(f"{name}: expected a list of integers, received {shown(value)}")
            object.__setattr__(self, name, None if value is None else tuple(value))
        if len(self.kernel_sizes or ()) != len(self.dilations or ()):
            raise UnsupportedError(
                f"kernel_sizes and dilations: expected lists of one length, received {self.kernel_sizes} and "
                f"{self.dilations}"
            )

    def _small(self, conv: Any) -> list[tuple[int, int]]:
        """``(size, dilation)`` of each small kernel."""
        if self.kernel_sizes is not None and self.dilations is not None:
            return list(zip(self.kernel_sizes, self.dilations))
        return list(zip(*_PUBLISHED.get(conv.kernel_size[0], ((), ()))))

    def branches(self, conv: Any, norm: nn.Module | None) -> dict[str, nn.Module]:
        """One per small kernel."""
        ndim = len(conv.kernel_size)
        return {
            f"kernel{k}_dilation{r}": conv_norm(conv, norm, [k] * ndim, dilation=[r] * ndim)
            for k, r in self._small(conv)
        }

    def reason_against(self, conv: Any, norm: nn.Module | None = None) -> str | None:
        """Depthwise, square, undilated, of a listed size, and large enough for every small kernel."""
        size = tuple(conv.kernel_size)
        if self.depthwise_only and not conv.groups == conv.in_channels == conv.out_channels:
            return "it is not depthwise; depthwise_only=False takes it all the same"
        if len(set(size)) > 1 or set(conv.dilation) != {1}:
            return f"it needs a square kernel without dilation, and has {size} with dilation {tuple(conv.dilation)}"
        small = self._small(conv)
        if not small:
            return f"the paper has no small kernels for size {size[0]}; give kernel_sizes and dilations"
        for k, r in small:
            window = r * (k - 1) + 1
            if window > size[0] or (size[0] - window) % 2:
                return f"a kernel of {k} taps and dilation {r} has no middle place in one of {size[0]}"
        return super().reason_against(conv, norm)
