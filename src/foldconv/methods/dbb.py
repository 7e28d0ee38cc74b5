"""Diverse Branch Block: Building a Convolution as an Inception-like Unit (Ding et al., CVPR 2021, arXiv 2103.13425).

Four branches, each ending in a norm (section 3.3, figure 2):

    k×k        BN(W_{k×k} * x)
    1×1        BN(W_{1×1} * x)
    1×1-avg    BN(avg(BN(W_{1×1} * x)))
    1×1-k×k    BN(W_{k×k} * BN((I + W_{1×1}) * x))

In the last two a norm stands before a window that pads. Padding with zeros there would put a value at the border that
no kernel reproduces, so the padding holds what the norm makes of zero (transform VI): `NormThenPad`.

Depthwise convolutions have no 1×1 branch and no 1×1 before the average; their 1×1-k×k branch is twice as wide.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Kernel, Sum, kernel_of, kernel_rule, scale_and_shift
from ..algebra.convolutions import CONV, CONVOLUTIONS
from ..algebra.rules import conv_geometry
from ..errors import UnsupportedError, shown
from ..formulas import POINT_BESIDE_ONE_TAP
from ..layers.foldable import all_are_watched, is_altered
from ..ops import is_recorded
from ._branched import BranchedMethod, conv_norm, norm_like, padding_modules
from ._registry import register
from ._windows import POOLS, add_by_moments, zero_padded


class NormThenPad(nn.Module):
    """A norm, then padding with what the norm's evaluation function makes of zero.

    In evaluation mode that is padding with zeros, then the norm.

    Args:
        norm: a batch norm of any kind.
        padding: ``(before, after)`` per spatial dimension, in samples.

    Source: Ding et al., CVPR 2021, transform VI.

    Example:
        >>> NormThenPad(nn.BatchNorm2d(3), [(1, 1), (0, 2)])(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 3, 6, 6])
    """

    def __init__(self, norm: nn.Module, padding: Sequence[tuple[int, int]]):
        super().__init__()
        self.norm = norm
        self.padding = [tuple(pair) for pair in padding]

    def forward(self, input: Tensor) -> Tensor:
        """Normalize and pad ``(batch, channels, *spatial)``."""
        output = self.norm(input)
        shift = self.of_zero(output)
        pads = [n for pair in reversed(self.padding) for n in pair]
        # F.pad knows one constant for all channels: zero. Ones where it padded bring in each channel's own.
        border = F.pad(output.new_zeros(1, 1, *output.shape[2:]), pads, value=1.0)
        return torch.addcmul(F.pad(output, pads), border, shift)

    def of_zero(self, output: Tensor) -> Tensor:
        """What the norm's evaluation function makes of zero, to broadcast with the norm's output.

        No gradient through it, as in the original: the padding follows the norm, it does not teach it.
        """
        return scale_and_shift(self.norm, output.dtype)[1].detach().reshape(-1, *(1,) * (output.dim() - 2))


class PaddedWindow(nn.Sequential):
    """Four modules in a row: any, a `NormThenPad`, a window (a convolution or an average pooling), and any.

    With ``s`` the value that pads channel by channel, ``window(pad(y)) = window₀(y - s) + window(s)``: taken out before
    the window and put back behind it, the padding is zeros, which a convolution brings in by itself. That saves two
    passes over a padded copy, and an average is then a depthwise convolution, faster than the pooling. So on CPUs;
    elsewhere, in half precision (where ``y - s`` is rounded), and where somebody looks, the modules run in a row.

    Example:
        >>> row = PaddedWindow()
        >>> row.add_module("conv", nn.Conv2d(2, 3, 1))
        >>> row.add_module("norm_and_pad", NormThenPad(nn.BatchNorm2d(3), [(1, 1), (1, 1)]))
        >>> row.add_module("pool", nn.AvgPool2d(3, stride=2))
        >>> row.add_module("norm", nn.BatchNorm2d(3))
        >>> row(torch.zeros(2, 2, 8, 8)).shape
        torch.Size([2, 3, 4, 4])
    """

    moments: bool = True
    """May they run by the moments of their input, where that is exact?"""

    def forward(self, input: Tensor) -> Tensor:
        """Run the four on ``(batch, channels, *spatial)``."""
        return self.add_to(None, input)

    def add_to(self, output: Tensor | None, input: Tensor, shared: Any = None) -> Tensor:
        """``output + forward(input)``, in place of `output`; `shared`: the moments of `input`, for others, too."""
        row: Any = list(self.children())
        if len(row) != 4 or not _can_shift(row[1], row[2], input):
            added = super().forward(input)
        elif self.moments and (y := add_by_moments(output, row, input, shared)) is not None:
            return y
        else:
            first, pad, window, last = row
            y = pad.norm(first(input))
            shift = pad.of_zero(y)
            weight, constant, arguments = zero_padded(pad, window, y, shift)
            added = last(CONV[y.dim() - 2](y - shift, weight, constant, *arguments))
        return added if output is None else output + added

    def to_kernel(self, dtype: torch.dtype | None = torch.float64) -> Kernel:
        """The kernel of the four in a row."""
        return kernel_of(nn.Sequential(OrderedDict(self.named_children())), dtype=dtype)


def _can_shift(pad: Any, window: Any, input: Any) -> bool:
    return (
        isinstance(input, Tensor)
        and input.device.type == "cpu"
        and input.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not is_recorded()
        and not all_are_watched()
        and type(pad) is NormThenPad
        and type(window) in (*POOLS.values(), *CONVOLUTIONS.values())
        and all(before == after for before, after in pad.padding)
        and not is_altered(pad)
        and not is_altered(window)
    )


@kernel_rule(NormThenPad)
def _norm_then_pad(module: NormThenPad, channels: int, ndim: int) -> Kernel:
    padded = Kernel.identity(channels, ndim).replace(padding=tuple(module.padding))
    return padded.scale(*scale_and_shift(module.norm))


@register
@dataclasses.dataclass(frozen=True)
class DBB(BranchedMethod):
    """Diverse Branch Block for `expand`.

    Args:
        internal_width: channels between the 1×1 and the k×k of the last branch; None: as many as the input has, twice
            as many for depthwise convolutions.
        moments: while training on a CPU, run what has one tap by the moments of its input, and keep no map before a
            window (ops/_moments.py and ops/_padded.py derive it): the same sum, gradients and running statistics.
            False runs the branches of section 3 one by one.

    Raises:
        UnsupportedError: for a width that is no integer ≥ 1.

    Source: Ding et al., CVPR 2021, section 3.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        >>> rich = foldconv.expand(net, "dbb")
        >>> [name for name, branch in rich[0].body.named_children()]
        ['main', 'point', 'average', 'stack']
    """

    internal_width: int | None = None
    moments: bool = True

    name: ClassVar[str] = "dbb"
    title: ClassVar[str] = "Diverse Branch Block"
    paper: ClassVar[str] = "Ding et al., CVPR 2021, arXiv 2103.13425"
    adds: ClassVar[str] = "1×1, 1×1-average and 1×1-k×k branches, each with norms"
    gain: ClassVar[str] = "ImageNet top-1, ResNet-18: 71.21 → 71.77 (as measured by OREPA's authors)"

    def __post_init__(self) -> None:
        super().__post_init__()
        width = self.internal_width
        if width is not None and (type(width) is not int or not 0 < width < 1 << 31):
            raise UnsupportedError(f"internal_width: expected an integer ≥ 1 or None, received {shown(width)}")

    def branches(self, conv: Any, norm: nn.Module | None) -> dict[str, nn.Module]:
        """1×1, 1×1-average and 1×1-k×k, as far as the convolution has them."""
        ndim = len(conv.kernel_size)
        depthwise = conv.groups == conv.out_channels
        point = {} if depthwise else {"point": conv_norm(conv, norm, [1] * ndim)}
        average = {"average": self._average(conv, norm, depthwise)} if set(conv.dilation) == {1} else {}
        return {**point, **average, "stack": self._stack(conv, norm, depthwise)}

    def _average(self, conv: Any, norm: nn.Module | None, depthwise: bool) -> nn.Sequential:
        branch, ndim = nn.Sequential(), len(conv.kernel_size)
        if depthwise and conv.in_channels == conv.out_channels:
            for name, pad in padding_modules(conv_geometry(conv)["padding"], conv.padding_mode).items():
                branch.add_module(name, pad)
        else:
            branch = _padded_window(conv, self.moments)
            branch.add_module("conv", _pointwise(conv, conv.out_channels))
            _add_norm_and_padding(branch, conv, norm, conv.out_channels)
        branch.add_module("pool", POOLS[ndim](conv.kernel_size, stride=conv.stride))
        branch.add_module("norm", norm_like(norm, conv))
        return branch

    def _stack(self, conv: Any, norm: nn.Module | None, depthwise: bool) -> nn.Sequential:
        branch = _padded_window(conv, self.moments)
        width = self.internal_width or conv.in_channels * (2 if depthwise else 1)
        first = _pointwise(conv, width)
        if width == conv.in_channels:
            nn.init.zeros_(first.weight)
            branch.add_module("first", Sum(conv=first, identity=nn.Identity()))
        else:
            branch.add_module("first", first)
        _add_norm_and_padding(branch, conv, norm, width)
        branch.add_module(
            "second",
            CONVOLUTIONS[len(conv.kernel_size)](
                width,
                conv.out_channels,
                conv.kernel_size,
                stride=conv.stride,
                dilation=conv.dilation,
                groups=conv.groups,
                bias=False,
                device=conv.weight.device,
                dtype=conv.weight.dtype,
            ),
        )
        branch.add_module("norm", norm_like(norm, conv))
        return branch

    def reason_against(self, conv: Any, norm: nn.Module | None = None) -> str | None:
        """A 1×1 kernel gains nothing; the internal width has to fit the groups."""
        if set(conv.kernel_size) == {1}:
            return POINT_BESIDE_ONE_TAP
        if self.internal_width is not None and self.internal_width % conv.groups:
            return f"internal_width={self.internal_width} is no multiple of its {conv.groups} groups"
        return super().reason_against(conv, norm)


def _pointwise(conv: Any, out_channels: int) -> Any:
    """A 1×1 convolution before the window: stride 1, nothing padded."""
    like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    cls = CONVOLUTIONS[len(conv.kernel_size)]
    return cls(conv.in_channels, out_channels, 1, groups=conv.groups, bias=False, **like)


def _pads_zeros(conv: Any) -> bool:
    return conv.padding_mode == "zeros" and any(n for pair in conv_geometry(conv)["padding"] for n in pair)


def _padded_window(conv: Any, moments: bool) -> nn.Sequential:
    """An empty branch for a window that pads as `conv` does."""
    if not _pads_zeros(conv):
        return nn.Sequential()
    branch = PaddedWindow()
    branch.moments = moments
    return branch


def _add_norm_and_padding(branch: nn.Sequential, conv: Any, norm: nn.Module | None, channels: int) -> None:
    """The inner norm and all of `conv`'s padding; modes other than zeros repeat values, which a norm commutes with."""
    inner, padding = norm_like(norm, conv, channels), conv_geometry(conv)["padding"]
    if _pads_zeros(conv):
        branch.add_module("norm_and_pad", NormThenPad(inner, padding))
        return
    branch.add_module("inner_norm", inner)
    for name, pad in padding_modules(padding, conv.padding_mode).items():
        branch.add_module(name, pad)
