"""The composition formulas, once, for every framework.

A formula is written for arrays of any framework that have ``+``, ``*`` and the few functions of `Primitives`. Kernels
are in one form, whatever the framework's own layout: ``(G, I, k, o)``, that is groups, input channels of a group, taps
(positions of the kernel, flattened in C order), output channels of a group. Each framework's part brings its kernels
into that form and back, and does nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol


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


def orepa(
    weight: Any,
    average: Any,
    prior: Any,
    product: Any,
    point: Any,
    separable: Any,
    scales: list[Any],
    cosines: Any,
    centre: Any,
    taps: int,
    p: Primitives,
) -> Any:
    """OREPA: the sum of its scaled branches.

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
        ``(G, I, k, o)``.

    Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3.2.
    """
    scale = iter(scales)
    kernel = next(scale) * weight
    kernel = kernel + next(scale) * average * (1.0 / taps)
    kernel = kernel + next(scale) * prior * cosines
    kernel = kernel + next(scale) * product
    if point is not None:
        kernel = kernel + next(scale) * point * centre
    return kernel + next(scale) * p.matmul(*separable)


def orepa_1x1(weight: Any, first: Any, second: Any, scales: Any, p: Primitives) -> Any:
    """OREPA of a kernel of one tap: the kernel and a product of two, each with its scale.

    Args:
        weight: ``(I, o)``.
        first, second: ``(I, t)`` and ``(t, o)``.
        scales: two of ``(o,)``.
        p: the framework's primitives.

    Returns:
        ``(I, o)``.

    Source: the code of Hu et al., CVPR 2022 (OREPA_1x1).

    Example:
        >>> import torch
        >>> from foldconv.ops._torch import TORCH
        >>> orepa_1x1(torch.ones(2, 3), torch.eye(2), torch.ones(2, 3), [torch.tensor(1.0), torch.tensor(0.5)], TORCH)
        tensor([[1.5000, 1.5000, 1.5000],
                [1.5000, 1.5000, 1.5000]])
    """
    return scales[0] * weight + scales[1] * p.matmul(first, second)


def cosines(out: int, size: Sequence[int]) -> list[list[float]]:
    """OREPA's fixed cosines: ``out`` rows of one number per tap, in double precision.

    Filter i of O belongs to dimension ``d = ⌊i·n / O⌋`` of n; its value at position x is
    ``cos(π · (x_d + ½) · (i + 1 - d·O/n) / k_d)``.

    Example:
        >>> [[round(value, 2) for value in row] for row in cosines(2, (2, 2))]
        [[0.71, 0.71, -0.71, -0.71], [0.71, -0.71, 0.71, -0.71]]
    """
    rows, positions = [], list(itertools.product(*(range(k) for k in size)))
    for i in range(out):
        axis = i * len(size) // out
        frequency = math.pi * (i + 1 - axis * out / len(size)) / size[axis]
        rows.append([math.cos(frequency * (position[axis] + 0.5)) for position in positions])
    return rows


def centre_tap(size: Sequence[int]) -> int:
    """The tap, among the flattened ones, at which a 1×1 branch stands; of an even size the first of the middle two.

    >>> centre_tap((3, 3)), centre_tap((1, 4))
    (4, 1)
    """
    index = 0
    for k in size:
        index = index * k + (k - 1) // 2
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
