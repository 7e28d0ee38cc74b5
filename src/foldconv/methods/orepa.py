"""OREPA (Hu et al., "Online Convolutional Re-parameterization", CVPR 2022).

The norms inside a RepVGG- or DBB-like block are replaced by learned scales per output channel. The branches are then
linear while training too, and one kernel can be composed from them before one convolution (section 3.2, figure 4):

    K = Σ_b vector[b] · branch_b                                     initial scale
        weight              k×k                                          .25
        avg_conv            1×1, then the average over the window        .25
        prior_conv          1×1, then fixed cosines per output           0
        kxk_idconv1, _conv2 1×1 (stored as what it adds to an            .5
                            identity), then k×k
        conv_1x1            1×1, at the centre tap                       1
        gconv_dw, _pw       k×k depthwise (8 filters per input           .5
                            channel), then 1×1

The cosines: filter i of O belongs to dimension d = ⌊i·n / O⌋ of n, and at position x of k it is
``cos(π · (x_d + ½) · (i + 1 - d·O/n) / k_d)``; for n = 2 and k = 3 those are the original's, which leaves other k
undefined. The centre of an even k is the tap that ``padding="same"`` aligns with the output, ``(k - 1) // 2``.

A 1×1 convolution is ``vector[0]·W + vector[1]·(W2 W1)``, where the wider of W1 and W2 is drawn and the other starts
as the identity. A kernel of 7 or more taps a side (the stem) can be a chain of such 3×3 kernels, or of plain ones:
`OREPALargeConv2d`. The chain is the true convolution stack; the original omits the flip of the later kernels.

In a network the norm that follows the layer is OREPA's own. From scratch the layer starts with 3.3 times the standard
deviation of torch's convolution, which only a norm behind it makes harmless. Starting from a trained kernel, every
scale but the first is zero: ``weight`` is the kernel, bit for bit; scales learn from the first step, branches from the
second.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..algebra.rules import conv_geometry
from ..errors import UnsupportedError, shown
from ..formulas import OrepaParts
from ..layers import ComposedConv, Foldable
from ..layers.factored import FactoredConv, stack_sizes
from ..layers.foldable import plain_class
from ._orepa_branches import Branches, PlainKernel, Pointwise
from ._registry import Init, Method, register

Large = Literal["orepa", "plain"]
SIZE_OF_LARGE = 7


class _OREPANd(ComposedConv):
    """OREPA and OREPA_1x1, for any number of dimensions; the rank classes only pin the base.

    Args:
        point: has the 1×1 branch; without it this is the convolution inside OREPA_VGG, which draws 1/√2 smaller.

    Shapes:
        input, output, ``weight`` (the origin branch) and ``bias`` as in the plain layer; ``avg_conv``, ``prior_conv``,
        ``conv_1x1``: ``(out, in/g, 1, 1)``; ``kxk_idconv1``: ``(t, in/g, 1, 1)`` and ``kxk_conv2``: ``(out, t/g, *k)``,
        ``t = in``, for more than four groups ``2·in``; ``gconv_dw``: ``(8·in, 1, *k)``, ``gconv_pw``:
        ``(out, 8·in/g, 1, 1)``; ``vector``: ``(branches, out)``. 1×1: ``l2i_conv1`` ``(t, in, 1, 1)`` and ``l2i_conv2``
        ``(out, t, 1, 1)`` with ``t = min(in, out)``.

    Raises:
        UnsupportedError: for a 1×1 kernel with groups.

    Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3; initial values as in its code.
    """

    composed_from = ("weight", "vector")  # the constructor adds the rest
    no_decay = frozenset({"vector"})

    def __init__(self, *args: Any, point: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        reason = _reason(self.kernel_size, self.groups, None)
        if reason is not None:
            raise UnsupportedError(reason)
        kind = Pointwise if math.prod(self.kernel_size) == 1 else Branches
        self.branches = kind(self.in_channels, self.out_channels, tuple(self.kernel_size), self.groups, point)
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        shapes = self.branches.shapes()
        for name, shape in shapes.items():
            if name != "weight":
                self.register_parameter(name, nn.Parameter(torch.empty(shape, **like)))
        self.composed_from = tuple(shapes)
        self.reset_parameters()

    def shapes_beside(self, parameters: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """As it was built."""
        return self.branches.shapes()

    def _composed(self) -> Tensor:
        """`kernel` by a short way: checks and choices were made when such parameters were first composed."""
        cls, held = type(self), self._parameters
        if (
            type(self.branches) is not Branches
            or cls.kernel is not ComposedConv.kernel
            or cls.compose is not _OREPANd.compose
            or "kernel" in vars(self)
        ):
            return self.kernel()
        # What is pruned or parametrized is no parameter any more.
        own: dict[str, Any] = {name: held[name] for name in self.composed_from if name in held}
        is_whole = len(own) == len(self.composed_from) and own["weight"].is_cpu
        composed = self.branches.compose_compiled(own) if is_whole else None
        return self.kernel() if composed is None else composed

    def _own(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.composed_from}

    def reset_extra_parameters(self) -> None:
        """Draw the branches and give only the origin branch, ``weight``, a scale: 1."""
        self.branches.draw(self._own(), preserve=True)

    def reset_parameters(self) -> None:
        """Initialize as the paper does; the bias as torch does."""
        _ConvNd.reset_parameters(self)  # pyright: ignore[reportArgumentType]
        if "vector" in self._parameters:  # not inside torch's constructor
            self.branches.draw(self._own(), preserve=False)

    def compose(self, *parameters: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The sum of the scaled branches as one kernel."""
        return self.branches.compose(dict(zip(self.composed_from, parameters)))

    def compose_branches(self, *parameters: Tensor) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The scaled branches."""
        return self.branches.kernels(dict(zip(self.composed_from, parameters)))

    def composition_tensors(self) -> tuple[Tensor, ...] | None:
        """The branches of a k×k kernel."""
        if isinstance(self.branches, Pointwise):
            return None
        return tuple(getattr(self, name) for name in self.composed_from)

    def feature_forward(self, input: Tensor) -> Tensor:
        """The branches on feature maps, scaled and added."""
        self.checked_parameters()
        y = self.branches.features(self._own(), input, **conv_geometry(self))
        return y if self.bias is None else y + self.bias.reshape(-1, *(1,) * len(self.kernel_size))

    def composition_cost(self) -> int:
        """Multiply-adds of composing, most of them for the 1×1 before the k×k."""
        return self.branches.cost()

    @property
    def method(self) -> OREPA:
        """The config that rebuilds this layer."""
        return OREPA(point=self.branches.point)

    def extra_repr(self) -> str:
        """torch's description and the method's options."""
        return super().extra_repr() + ("" if self.branches.point else ", point=False")


class _OREPALargeNd(FactoredConv):
    """LargeConv and LargeConvBase, for any number of dimensions; the rank classes only pin the base.

    Args:
        large: ``"orepa"`` (each kernel an OREPA, LargeConv) or ``"plain"`` (LargeConvBase).

    Shapes:
        input, output and ``bias`` as in the plain layer; the parameters of `OREPAConv2d` with the number of the kernel
        behind their names (``weight0``, ``vector0``, ...), every inner width being ``out``; ``weight``, the composed
        kernel in the plain shape, can only be read (`start_from` sets it).

    Raises:
        UnsupportedError: for even sizes, or none of at least 7.

    Source: the code of Hu et al., CVPR 2022 (LargeConv), composed as the stack of convolutions that it stands for.
    """

    def __init__(self, *args: Any, large: Large = "orepa", **kwargs: Any):
        super().__init__(*args, **kwargs)
        if large not in ("orepa", "plain"):
            raise UnsupportedError(f"large: expected 'orepa' or 'plain', received {large!r}")
        reason = _reason(self.kernel_size, self.groups, large)
        if reason is None and max(self.kernel_size) < SIZE_OF_LARGE:
            reason = (
                f"LargeConv is for sizes of at least {SIZE_OF_LARGE}, received {tuple(self.kernel_size)}; use OREPAConv"
            )
        if reason is not None:
            raise UnsupportedError(reason)
        self.large: Large = large
        sizes, kind = stack_sizes(self.kernel_size), Branches if large == "orepa" else PlainKernel
        inputs = [self.in_channels] + [self.out_channels] * (len(sizes) - 1)
        self.stages = tuple(kind(i, self.out_channels, size, self.groups) for i, size in zip(inputs, sizes))
        shapes = [stage.shapes() for stage in self.stages]
        parameters = {f"{name}{n}": shape for n, own in enumerate(shapes) for name, shape in own.items()}
        self.build([own["weight"] for own in shapes], parameters)

    @property
    def no_decay(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The scales of every kernel of the chain."""
        return frozenset(name for name in self.composed_from if name.startswith("vector"))

    def _split(self, tensors: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of each kernel of the chain, by their names in `Branches`."""
        left = iter(tensors)
        return [dict(zip(names, left)) for names in (list(stage.shapes()) for stage in self.stages)]

    def _own(self) -> list[dict[str, Tensor]]:
        return self._split([getattr(self, name) for name in self.composed_from])

    def factor_kernels(self, *parameters: Tensor) -> list[Tensor]:
        """The kernels of the chain."""
        return [stage.compose(p) for stage, p in zip(self.stages, self._split(parameters))]

    def run_factor(self, index: int, input: Tensor, **geometry: Any) -> Tensor:
        """One kernel of the chain by its branches."""
        return self.stages[index].features(self._own()[index], input, **geometry)

    def draw(self) -> None:
        """Each kernel as the paper draws it."""
        for stage, p in zip(self.stages, self._own()):
            stage.draw(p, preserve=False)

    def reset_extra_parameters(self) -> None:
        """Each kernel as the paper draws it, with a scale for its origin branch only."""
        self.draw()
        for stage, p in zip(self.stages, self._own()):
            stage.draw(p, preserve=True)

    def set_factors(self, values: list[Tensor]) -> None:
        """Write the kernels of the chain into their origin branches."""
        for p, value in zip(self._own(), values):
            p["weight"].copy_(value)

    def composition_cost(self) -> int:
        """Multiply-adds of composing the kernels and of chaining them."""
        return super().composition_cost() + sum(stage.cost() for stage in self.stages)

    @property
    def method(self) -> OREPA:
        """The config that rebuilds this layer."""
        return OREPA(self.large)

    def extra_repr(self) -> str:
        """torch's description and the method's options."""
        return f"{super().extra_repr()}, large={self.large!r}"


def _reason(kernel_size: Sequence[int], groups: int, large: Large | None) -> str | None:
    """Why OREPA does not build a kernel of this size."""
    if large is not None and any(k % 2 == 0 for k in kernel_size):
        return f"its size {tuple(kernel_size)} is even, which no stack of 3-tap kernels has; use large=None"
    return OrepaParts.refusal(kernel_size, groups)


class OREPAConv1d(_OREPANd, nn.Conv1d):
    """``nn.Conv1d`` that trains as an OREPA, a kernel of one tap as an OREPA_1x1."""


class OREPAConv2d(_OREPANd, nn.Conv2d):
    """``nn.Conv2d`` that trains as an OREPA, a kernel of one tap as an OREPA_1x1.

    Example:
        >>> layer = OREPAConv2d(4, 8, 3, padding=1)
        >>> layer.vector.shape
        torch.Size([6, 8])
        >>> x = torch.randn(1, 4, 6, 6)
        >>> torch.allclose(layer(x), layer.fold()(x), atol=1e-5)
        True
    """


class OREPAConv3d(_OREPANd, nn.Conv3d):
    """``nn.Conv3d`` that trains as an OREPA, a kernel of one tap as an OREPA_1x1."""


class OREPALargeConv1d(_OREPALargeNd, nn.Conv1d):
    """``nn.Conv1d`` of 7 or more taps a side that trains as a chain of 3-tap kernels."""


class OREPALargeConv2d(_OREPALargeNd, nn.Conv2d):
    """``nn.Conv2d`` of 7 or more taps a side that trains as a chain of 3-tap kernels.

    Example:
        >>> layer = OREPALargeConv2d(3, 32, 7, stride=2, padding=3, large="plain")
        >>> [name for name, p in layer.named_parameters()]
        ['bias', 'weight0', 'weight1', 'weight2']
        >>> layer.fold()
        Conv2d(3, 32, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3))
    """


class OREPALargeConv3d(_OREPALargeNd, nn.Conv3d):
    """``nn.Conv3d`` of 7 or more taps a side that trains as a chain of 3-tap kernels."""


@register
@dataclasses.dataclass(frozen=True)
class OREPA(Method):
    """OREPA for `expand`. As in the paper's ResNets:

    * ResNet-18/34, whose shortcuts stay plain: ``expand(net, OREPA(large="orepa"), exclude="*.downsample.*")``;
    * ResNet-50 and deeper, where every convolution is replaced: ``expand(net, OREPA(large="orepa"))``.

    Args:
        large: what becomes of kernels with a side of 7 or more: None (branches like any other), ``"orepa"`` (the
            paper's LargeConv, without a parameter of the kernel's shape) or ``"plain"`` (LargeConvBase). Starting
            one from a trained 7×7 kernel needs an output 9 times as wide as the input, as in the stem of a ResNet.
        point: the 1×1 branch of k×k kernels.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 7, bias=False), nn.Conv2d(32, 8, 3, bias=False))
        >>> foldconv.expand(net, foldconv.OREPA(large="plain"))
        Sequential(
          (0): OREPALargeConv2d(3, 32, kernel_size=(7, 7), stride=(1, 1), bias=False, large='plain')
          (1): OREPAConv2d(32, 8, kernel_size=(3, 3), stride=(1, 1), bias=False)
        )
    """

    large: Large | None = None
    point: bool = True

    name: ClassVar[str] = "orepa"
    title: ClassVar[str] = "OREPA"
    paper: ClassVar[str] = "Hu et al., CVPR 2022, arXiv 2204.00826"
    adds: ClassVar[str] = "five linear branches with a learned scale per channel"
    gain: ClassVar[str] = "ImageNet top-1, ResNet-18: 71.21 → 72.13"
    kind: ClassVar[Literal["composable", "statistical"]] = "composable"

    def __post_init__(self) -> None:
        if not isinstance(self.point, bool):
            raise UnsupportedError(f"point: expected True or False, received {shown(self.point)}")
        if self.large not in (None, "orepa", "plain"):
            raise UnsupportedError(f"large: expected None, 'orepa' or 'plain', received {self.large!r}")

    def reason_against(self, conv: nn.Module, norm: nn.Module | None = None) -> str | None:
        """Transposed convolutions, 1×1 with groups, even sizes of a chain."""
        if plain_class(conv) not in _OREPANd.ranks:
            return "OREPA's branches gather; a transposed convolution scatters"
        return _reason(conv.kernel_size, conv.groups, self._large_for(conv))  # pyright: ignore

    def expand(self, conv: nn.Module, init: Init = "preserve", norm: nn.Module | None = None) -> Foldable:
        """The OREPA around `conv`'s own weight; ``init="paper"`` draws every branch anew."""
        if self._large_for(conv) is not None:
            return _OREPALargeNd.from_conv(conv, init, large=self.large)
        return _OREPANd.from_conv(conv, init, point=self.point)

    def _large_for(self, conv: nn.Module) -> Large | None:
        size: tuple[int, ...] = conv.kernel_size  # pyright: ignore[reportAssignmentType]
        return self.large if max(size) >= SIZE_OF_LARGE else None
