"""The formulas, once, for every framework: how kernels are composed, and the sizes and first values of their parts.

A formula is written for arrays of any framework that have ``+``, ``*`` and the few functions of `Primitives`. Kernels
are in one form, whatever the framework's own layout: ``(G, I, k, o)``, that is groups, input channels of a group, taps
(positions of the kernel, flattened in C order), output channels of a group. Each framework's part brings its kernels
into that form and back, and does nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from .errors import UnsupportedError

DOCONV_OF_ONE_TAP = "its kernel has one tap, where D would add nothing"
POINT_BESIDE_ONE_TAP = "its kernel has one tap, which a 1×1 branch would only repeat"


class Primitives(Protocol):
    """What a framework supplies besides its arrays' ``+`` and ``*``, which broadcast."""

    def matmul(self, a: Any, b: Any, /) -> Any:
        """The product of the last two dimensions, for every index of the others; equal numbers of dimensions."""
        ...

    def first_taps(self, x: Any, taps: int, /) -> Any:
        """``x[:, :, :taps]``."""
        ...


def doconv(W: Any, D: Any, taps: int, p: Primitives) -> Any:
    """DO-Conv: a depthwise kernel before the convolution's own.

    ``K[g, i, m, o] = W[g, i, m, o] + Σ_s D[g, i, m, s] · W[g, i, s, o]``

    Args:
        W: ``(G, I, S, o)``, S ≥ k.
        D: ``(G, I, k, S)``, what is added to the identity.
        taps: k.
        p: the framework's primitives.

    Returns:
        ``(G, I, k, o)``.

    Source: Cao et al., "DO-Conv", TIP 2022, eq. 4.

    Example:
        >>> import torch
        >>> from foldconv.ops._torch import TORCH
        >>> doconv(torch.randn(1, 4, 9, 8), torch.zeros(1, 4, 9, 9), 9, TORCH).shape
        torch.Size([1, 4, 9, 8])
    """
    return p.first_taps(W, taps) + p.matmul(D, W)


def doconv_multiplier(given: Any, size: Sequence[int], argument: str = "depth_multiplier") -> int:
    """S for a kernel of `size`: `given`, or its taps for None; 1 for a kernel of one tap, which has no D.

    Raises:
        UnsupportedError: naming `argument`, for anything but an integer of at least the taps.

    >>> doconv_multiplier(None, (3, 3)), doconv_multiplier(12, (3, 3)), doconv_multiplier(4, (1, 1))
    (9, 12, 1)
    """
    taps = math.prod(size)
    multiplier = taps if given is None else given
    if not isinstance(multiplier, int) or isinstance(multiplier, bool) or multiplier < taps:
        raise UnsupportedError(
            f"{argument}: expected an integer ≥ {taps}, the taps of a kernel of size {tuple(size)}, "
            f"received {given!r}; fewer could not express every kernel"
        )
    return multiplier if taps > 1 else 1


# ---------------------------------------------------------------------- OREPA


@dataclasses.dataclass(frozen=True)
class OrepaParts:
    """What an OREPA kernel is made of: parameters by name, their shapes and initial values.

    Args:
        in_channels, out_channels, groups: of the convolution.
        size: of its kernel; of one tap it is an OREPA_1x1.
        point: has the 1×1 branch.

    Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3.2, and its code.

    Example:
        >>> parts = OrepaParts(4, 8, (3, 3), 2)
        >>> parts.shapes()["gconv_pw"], parts.scales
        ((8, 16, 1, 1), [0.25, 0.25, 0.0, 0.5, 1.0, 0.5])
    """

    in_channels: int
    out_channels: int
    size: tuple[int, ...]
    groups: int
    point: bool = True

    FILTERS = 8
    """Of the depthwise branch, per input channel."""

    @property
    def taps(self) -> int:
        """Of the kernel."""
        return math.prod(self.size)

    @property
    def per_group(self) -> tuple[int, int]:
        """Output and input channels of one group."""
        return self.out_channels // self.groups, self.in_channels // self.groups

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter, as a kernel ``(outputs, inputs of a group, *size)``; the origin branch first."""
        out, i, size, point = self.out_channels, self.per_group[1], self.size, (1,) * len(self.size)
        if self.taps == 1:
            inner = min(i, out)
            branches = {"l2i_conv1": (inner, i, *size), "l2i_conv2": (out, inner, *size)}
        else:
            # More groups than this leave a group few channels; the inner 1×1 is then twice as wide.
            inner = i * (1 if self.groups <= 4 else 2)
            one = (out, i, *point)
            branches = {
                "avg_conv": one,
                "prior_conv": one,
                "kxk_idconv1": (self.groups * inner, i, *point),
                "kxk_conv2": (out, inner, *size),
                **({"conv_1x1": one} if self.point else {}),
                "gconv_dw": (self.in_channels * self.FILTERS, 1, *size),
                "gconv_pw": (out, i * self.FILTERS, *point),
            }
        return {"weight": (out, i, *size), **branches, "vector": (len(self.scales), out)}

    @property
    def scales(self) -> list[float]:
        """Initial values of the rows of ``vector``, in the order of the branches."""
        if self.taps == 1:
            return [1.0, 0.5]
        return [0.25, 0.25, 0.0, 0.5, *([1.0] if self.point else []), 0.5]

    @property
    def undrawn(self) -> str:
        """What starts as an identity: the narrower factor of OREPA_1x1; else, as zero beside one, the inner 1×1."""
        if self.taps > 1:
            return "kxk_idconv1"
        return "l2i_conv1" if self.out_channels > self.in_channels else "l2i_conv2"

    @staticmethod
    def refusal(size: Sequence[int], groups: int | None) -> str | None:
        """Why there is no OREPA of a kernel; `groups`: None for a depthwise one.

        >>> OrepaParts.refusal((1, 1), 2)
        'its kernel has one tap and 2 groups; OREPA_1x1 is defined for one group'
        """
        if math.prod(size) > 1 or groups == 1:
            return None
        found = "a group per channel" if groups is None else f"{groups} groups"
        return f"its kernel has one tap and {found}; OREPA_1x1 is defined for one group"


def orepa_slope(taps: int, point: bool) -> float:
    """The negative slope that the authors give to Kaiming's uniform initializer.

    OREPA_VGG, which has the 1×1 outside, draws by 1/√2 smaller, and so does OREPA_1x1.
    """
    return 0.0 if point and taps > 1 else 1.0


def orepa(
    weight: Any,
    average: Any,
    prior: Any,
    product: Any,
    point: Any,
    separable: Any,
    scales: Iterable[Any],
    cosines: Any,
    centre: Any,
    taps: int,
    p: Primitives,
) -> Iterator[tuple[str, Any]]:
    """OREPA: its scaled branches, by name; the kernel is their `total`.

    Args:
        weight: ``(G, I, k, o)``.
        average, prior: ``(G, I, 1, o)``, the 1×1 before an average and before the cosines.
        product: ``(G, I, k, o)``, the 1×1 before the k×k: ``Σ_t first[g, i, t] · second[g, t, m, o]``.
        point: ``(G, I, 1, o)``, or None.
        separable: ``(depthwise, pointwise)``: ``(G, I, k, T)`` and ``(G, I, T, o)``.
        scales: ``(G, 1, 1, o)`` each, in this order; without `point` one fewer.
        cosines: ``(G, 1, k, o)``, not learned.
        centre: ``(1, 1, k, 1)``, one at the tap of `point`, else zero; or None.
        taps: k.
        p: the framework's primitives.

    Returns:
        ``(G, I, k, o)`` each, but that of the average ``(G, I, 1, o)``, alike at all taps.

    Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3.2.
    """
    scale = iter(scales)
    yield "origin", next(scale) * weight
    yield "average", next(scale) * average * (1.0 / taps)
    yield "prior", next(scale) * prior * cosines
    yield "stack", next(scale) * product
    if point is not None:
        yield "point", next(scale) * point * centre
    yield "separable", next(scale) * p.matmul(*separable)


def orepa_1x1(weight: Any, product: Any, scales: Any) -> Iterator[tuple[str, Any]]:
    """OREPA of a kernel of one tap: the kernel and a product of two, each with its scale; the kernel is their `total`.

    Args:
        weight: the inputs and outputs in any order.
        product: in the same order, ``Σ_t first[i, t] · second[t, o]``.
        scales: two, broadcasting over the outputs.

    Source: the code of Hu et al., CVPR 2022 (OREPA_1x1).

    >>> total(orepa_1x1(3.0, 4.0, [1.0, 0.5]))
    5.0
    """
    yield "origin", scales[0] * weight
    yield "product", scales[1] * product


def total(branches: Iterable[tuple[str, Any]]) -> Any:
    """The sum of branches."""
    kernel = None
    for _, branch in branches:
        kernel = branch if kernel is None else kernel + branch
    return kernel


def cosines(filters: Any, taps: Any, size: Sequence[int], cos: Callable[[Any], Any]) -> Any:
    """OREPA's fixed cosines, a row for each of O filters and a column for each tap.

    Filter i of O belongs to dimension ``d = ⌊i·n / O⌋`` of n; its value at position x is
    ``cos(π · (x_d + ½) · (i + 1 - d·O/n) / k_d)``.

    Args:
        filters: 0 … O - 1, in double precision, ``(O, 1)``.
        taps: 0 … k - 1, in double precision, ``(k,)``.
        size: k per dimension.
        cos: the framework's cosine.

    Example:
        >>> import numpy as np
        >>> cosines(np.arange(2.0)[:, None], np.arange(4.0), (2, 2), np.cos).round(2)
        array([[ 0.71,  0.71, -0.71, -0.71],
               [ 0.71, -0.71,  0.71, -0.71]])
    """
    n, out, step = len(size), filters.shape[0], math.prod(size)
    axis, phase = filters * n // out, 0.0
    for dimension, k in enumerate(size):
        step //= k
        phase = phase + (axis == dimension) * ((taps // step % k + 0.5) / k)
    return cos(math.pi * phase * (filters + 1 - axis * (out / n)))


# ---------------------------------------------------------------------- parts of several


def middle(size: Sequence[int]) -> tuple[int, ...]:
    """Where in a kernel a 1×1 branch stands: the position that ``padding="same"`` aligns with the output.

    >>> middle((3, 3)), middle((1, 4))
    ((1, 1), (0, 1))
    """
    return tuple((k - 1) // 2 for k in size)


def centre_tap(size: Sequence[int]) -> int:
    """`middle` among the flattened taps.

    >>> centre_tap((3, 3)), centre_tap((1, 4))
    (4, 1)
    """
    index = 0
    for k, position in zip(size, middle(size)):
        index = index * k + position
    return index


def repvgg(weight: Any, point: Any, identity: Any, scales: Sequence[Any], centre: Any) -> Any:
    """RepVGG's evaluation-mode kernel: ``s₀ · weight + (s₁ · point + s₂ · identity) · centre``.

    Args:
        weight: ``(G, I, k, o)``.
        point: ``(G, I, 1, o)``.
        identity: ``(1, I, 1, o)``, one where the output channel is the input channel, else zero; None without one.
        scales: of the branches' norms, ``(G, 1, 1, o)`` each; the shift is the sum of the norms' own.
        centre: ``(1, 1, k, 1)``, one at `centre_tap`, else zero.

    Returns:
        ``(G, I, k, o)``.

    Source: Ding et al., "RepVGG", CVPR 2021, section 3.3.

    Example:
        >>> import torch
        >>> one, centre = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 1.0, 0.0]).reshape(1, 1, 3, 1)
        >>> repvgg(torch.ones(1, 1, 3, 1), one, one, [2 * one, 3 * one, 4 * one], centre).flatten()
        tensor([2., 9., 2.])
    """
    beside = scales[1] * point
    if identity is not None:
        beside = beside + scales[2] * identity
    return scales[0] * weight + beside * centre


def norm(gamma: Any, beta: Any, mean: Any, variance: Any, eps: float) -> tuple[Any, Any]:
    """A batch norm's evaluation function as scale and shift per channel: ``γ / √(σ² + ε)`` and ``β - μ · scale``

    Args:
        gamma, beta: ``(channels,)``; None for 1 and 0.
        mean, variance: ``(channels,)``, the running statistics.
        eps: added to the variance.

    Example:
        >>> norm(2.0, 1.0, 3.0, 4.0, 0.0)
        (1.0, -2.0)
    """
    scale = (variance + eps) ** -0.5
    scale = scale if gamma is None else gamma * scale
    shift = -mean * scale
    return scale, shift if beta is None else beta + shift
