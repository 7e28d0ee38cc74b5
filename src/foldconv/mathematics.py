"""The composition formulas, once, for every framework.

A formula is written for arrays of any framework that have ``+``, ``*`` and the few functions of `Primitives`. Kernels
are in one form, whatever the framework's own layout: ``(G, I, k, o)``, that is groups, input channels of a group, taps
(positions of the kernel, flattened in C order), output channels of a group. Each framework's part brings its kernels
into that form and back, and does nothing else.
"""

from __future__ import annotations

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
        >>> from foldconv.ops._algebra import TORCH
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
