"""DO-Conv: Depthwise Over-parameterized Convolutional Layer (Cao et al., TIP 2022, arXiv 2006.12030).

A depthwise kernel ``D`` of ``S`` taps per position is chained with the convolution's kernel ``W`` (eq. 2-4):

    feature composition    y = W * (D ∘ x)          run the depthwise convolution, then W on its S·in channels
    kernel composition     y = (Dᵀ ∘ W) * x         K[o, i, m] = Σ_s D[i, m, s] · W[o, i, s]

Both are the same function; the second costs ``S·k`` multiply-adds per entry of the kernel, once per step.
With ``S ≥ k`` (k: taps of the kernel) the layer is as expressive as the convolution, with ``S < k`` it is not.

``D`` starts as the identity on the first k of its S taps. It is stored as what it adds to that identity, so zeros
mean "an ordinary convolution", weight decay pulls towards one, and ``weight`` (the first k taps of W) has the
shape and, at the start, the meaning of the convolution's own. The S - k surplus taps of W are ``weight_extra``.
A kernel of one tap has nothing to gain: it stays an ordinary convolution.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import formulas, ops
from ..algebra import Kernel
from ..algebra.rules import conv_geometry, transposed_geometry
from ..errors import UnsupportedError
from ..layers import ComposedConv, Foldable
from ..layers.once import evaluated_once
from ._registry import Init, Method, register

Composition = Literal["kernel", "feature"]


class _DOConvNd(ComposedConv):
    """All of DO-Conv, for any number of dimensions, transposed or not; the rank classes only pin the base.

    Args:
        depth_multiplier: S, taps of D per position; an integer ≥ the taps of the kernel, by default equal to them.
        composition: ``"kernel"`` (compose, then convolve once) or ``"feature"`` (depthwise convolution, then W).

    Shapes:
        input, output, ``weight`` and ``bias`` as in the plain layer; ``D``: ``(in, k, S)``, k the taps of the kernel,
        acts on the input (of a transposed convolution too); ``weight_extra``: ``(*weight.shape[:2], S - k)``, absent
        when S = k.

    Raises:
        UnsupportedError: for a `depth_multiplier` below the taps of the kernel.

    Source: Cao et al., "DO-Conv", TIP 2022, eq. 2-4; ``groups=in_channels`` gives its DO-DConv, other groups DO-GConv.
    """

    composed_from = ("weight", "D", "weight_extra")
    depth_multiplier: int
    composition: Composition
    D: Tensor | None
    weight_extra: Tensor | None

    def __init__(
        self,
        *args: Any,
        depth_multiplier: int | None = None,
        composition: Composition = "kernel",
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        taps = math.prod(self.kernel_size)
        if composition not in ("kernel", "feature"):
            raise UnsupportedError(f"composition: expected 'kernel' or 'feature', received {composition!r}")
        self.depth_multiplier = formulas.doconv_multiplier(depth_multiplier, self.kernel_size)
        self.composition = composition
        extra = self.depth_multiplier - taps
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        empty = nn.Parameter(torch.empty(self.in_channels, taps, self.depth_multiplier, **like))
        self.register_parameter("D", empty if taps > 1 else None)
        surplus = nn.Parameter(torch.empty(*self.weight.shape[:2], extra, **like)) if extra > 0 else None
        self.register_parameter("weight_extra", surplus)
        self.reset_extra_parameters()

    @property
    def scales_with_weight(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Not where W has taps beside ``weight``."""
        return self.weight_extra is None

    def reset_extra_parameters(self) -> None:
        """D adds nothing yet; the surplus taps of W are drawn like the others, so that D has something to learn."""
        if self.D is not None:
            nn.init.zeros_(self.D)
        if self.weight_extra is not None:
            fan_in = math.prod(self.weight.shape[1:])
            nn.init.uniform_(self.weight_extra, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def shapes_beside(self, parameters: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """D has the channels of the input and as many taps as W."""
        weight = parameters["weight"]
        channels = weight.shape[0] if self.transposed else weight.shape[1] * self.groups
        taps = math.prod(weight.shape[2:])
        return {
            "D": (channels, taps, self.depth_multiplier),
            "weight_extra": (*weight.shape[:2], self.depth_multiplier - taps),
        }

    def compose(self, weight: Tensor, D: Tensor | None, weight_extra: Tensor | None) -> Tensor:  # pyright: ignore
        """``K = W + D·W`` (eq. 4): D is a residual, the identity is the first term."""
        if D is None:
            return weight
        if weight_extra is None and not self.transposed:
            return ops.compose_depthwise(weight, D, self.groups)
        taps = _taps_of(weight, weight_extra)
        if self.transposed:  # the input channel comes first: a product per channel as it lies
            return weight + torch.matmul(D, taps.transpose(1, 2)).transpose(1, 2).reshape(weight.shape)
        return ops.compose_depthwise(taps, D, self.groups).reshape(weight.shape)

    def compose_branches(self, weight: Tensor, D: Tensor | None, weight_extra: Tensor | None) -> dict[str, Tensor]:  # pyright: ignore
        """The two terms of K: the identity's, which is W, and what D learned to add to the identity."""
        if D is None:
            return {"kernel": weight}
        added = D @ _rows(_taps_of(weight, weight_extra), self.groups, self.transposed)  # (in, k, outputs)
        parts = self.in_channels if self.transposed else self.groups
        added = added.unflatten(0, (parts, -1)).permute(0, 3, 1, 2)  # transposed: a group of its own for each channel
        return {"identity": weight, "D": added.reshape(weight.shape)}

    def measures(self) -> dict[str, Any]:
        """``identity_distance``: ‖D - I‖ / ‖I‖, how far D is from the identity that it starts as."""
        if self.D is None:
            return {}
        channels, taps, _ = self.D.shape
        return {"identity_distance": self.D.detach().double().norm().item() / math.sqrt(channels * taps)}

    def composition_tensors(self) -> tuple[Tensor, ...] | None:
        """The weights and D, unless torch's own product does it."""
        if self.D is None or self.transposed:
            return None
        return self.weight.flatten(2), self.D

    def factors(self) -> tuple[Kernel, Kernel]:
        """The layer as two kernels to run one after the other: D as a depthwise one, W as a pointwise one."""
        self.checked_parameters()
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        ndim, channels, multiplier = len(self.kernel_size), self.in_channels, self.depth_multiplier
        taps = math.prod(self.kernel_size)
        identity = torch.eye(taps, multiplier, dtype=dtype, device=self.weight.device)
        full = identity.expand(channels, taps, multiplier) if self.D is None else identity + self.D.to(dtype)
        geometry = (transposed_geometry if self.transposed else conv_geometry)(self)
        geometry["groups"] = channels
        depthwise = full.transpose(1, 2).reshape(channels * multiplier, 1, *self.kernel_size)
        rows = _rows(_taps_of(self.weight, self.weight_extra), self.groups, self.transposed)
        pointwise = rows.reshape(self.groups, channels // self.groups * multiplier, -1).transpose(1, 2)
        pointwise = pointwise.reshape(self.out_channels, -1, *(1,) * ndim)
        return (
            Kernel(depthwise.to(self.weight.dtype), **geometry),
            Kernel(pointwise, self.bias, groups=self.groups),
        )

    def feature_forward(self, input: Tensor) -> Tensor:
        """Feature composition (eq. 3): ``W * (D ∘ x)``."""
        depthwise, pointwise = self.factors()
        return pointwise(depthwise(input))

    @evaluated_once
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve; arguments and shapes as in the plain layer."""
        featured = self.composition == "feature" and isinstance(input, Tensor)  # not a stand-in of torch.fx
        if featured and self.D is not None and output_size is None:
            return self.feature_forward(input)
        return self._convolve(input, output_size)

    def _composed(self) -> Tensor:
        """`kernel`, by a short way where nothing is special: of a small network's step, Python is what counts."""
        cls, held = type(self), self._parameters
        weight, D = held.get("weight"), held.get("D")
        if (
            weight is None
            or D is None
            or held.get("weight_extra") is not None
            or cls.kernel is not ComposedConv.kernel
            or cls.compose is not _DOConvNd.compose
        ):
            return self.kernel()
        composed = ops.compose_compiled(weight, D, self.groups)
        return self.kernel() if composed is None else composed

    @property
    def method(self) -> DOConv:
        """The config that rebuilds this layer."""
        return DOConv(self.depth_multiplier, self.composition)

    def composition_cost(self) -> int:
        """Multiply-adds of kernel composition: ``S·k·out·in/groups``."""
        return 0 if self.D is None else self.weight.numel() * self.depth_multiplier

    def extra_repr(self) -> str:
        """torch's description and the method's options."""
        options = f", depth_multiplier={self.depth_multiplier}"
        if self.composition != "kernel":
            options += f", composition={self.composition!r}"
        return super().extra_repr() + options


def _taps_of(weight: Tensor, extra: Tensor | None) -> Tensor:
    """W with all S taps in its last dimension: ``(*, *, S)``."""
    flat = weight.flatten(2)
    if extra is None:
        return flat
    extra = extra.to(flat.dtype)
    if flat.is_contiguous():
        return torch.cat([flat, extra], dim=2)
    # In channels_last the taps come before the input channel.
    return torch.cat([flat.transpose(1, 2), extra.transpose(1, 2)], dim=1).transpose(1, 2)


def _rows(taps: Tensor, groups: int, transposed: bool) -> Tensor:
    """``(in, S, outputs that read the input channel)`` from W in its convolution's layout."""
    if transposed:  # (in, out/g, S)
        return taps.transpose(1, 2)
    out, per_group, multiplier = taps.shape  # (out, in/g, S)
    rows = taps.reshape(groups, out // groups, per_group, multiplier).permute(0, 2, 3, 1)
    return rows.reshape(groups * per_group, multiplier, out // groups)


class DOConv1d(_DOConvNd, nn.Conv1d):
    """``nn.Conv1d`` that trains as a DO-Conv."""


class DOConv2d(_DOConvNd, nn.Conv2d):
    """``nn.Conv2d`` that trains as a DO-Conv.

    Example:
        >>> layer = DOConv2d(4, 8, 3, padding=1)
        >>> plain = layer.fold()
        >>> type(plain).__name__, plain.weight.shape
        ('Conv2d', torch.Size([8, 4, 3, 3]))
        >>> x = torch.randn(1, 4, 6, 6)
        >>> torch.allclose(layer(x), plain(x), atol=1e-6)
        True
    """


class DOConv3d(_DOConvNd, nn.Conv3d):
    """``nn.Conv3d`` that trains as a DO-Conv."""


class DOConvTranspose1d(_DOConvNd, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` that trains as a DO-Conv."""


class DOConvTranspose2d(_DOConvNd, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` that trains as a DO-Conv."""


class DOConvTranspose3d(_DOConvNd, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` that trains as a DO-Conv."""


@register
@dataclasses.dataclass(frozen=True)
class DOConv(Method):
    """DO-Conv for `expand`.

    Args:
        depth_multiplier: taps of D per position; None: as many as the kernel has.
        composition: ``"kernel"`` or ``"feature"``.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> foldconv.expand(net, foldconv.DOConv(depth_multiplier=12))[0]
        DOConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), depth_multiplier=12)
    """

    depth_multiplier: int | None = None
    composition: Composition = "kernel"

    name: ClassVar[str] = "doconv"
    title: ClassVar[str] = "DO-Conv"
    paper: ClassVar[str] = "Cao et al., TIP 2022, arXiv 2006.12030"
    adds: ClassVar[str] = "a depthwise kernel D before the convolution's own"
    gain: ClassVar[str] = "ImageNet top-1, ResNet-18: 70.87 → 71.69"
    kind: ClassVar[Literal["composable", "statistical"]] = "composable"

    def reason_against(self, conv: nn.Module, norm: nn.Module | None = None) -> str | None:
        """A kernel of one tap gains nothing."""
        if math.prod(conv.kernel_size) == 1:  # pyright: ignore
            return formulas.DOCONV_OF_ONE_TAP
        return None

    def expand(self, conv: nn.Module, init: Init = "preserve", norm: nn.Module | None = None) -> Foldable:
        """The DO-Conv around `conv`'s own weight; ``init="paper"`` draws the weight anew (eq. 5: D = identity)."""
        layer = _DOConvNd.from_conv(conv, **dataclasses.asdict(self))
        if init == "paper":
            layer.reset_parameters()
        return layer
