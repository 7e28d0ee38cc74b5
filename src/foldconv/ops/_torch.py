"""The always-right path: torch operations, differentiable any number of times, for every device, dtype and layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import formulas


class Orepa(NamedTuple):
    """What an OREPA kernel is composed from; shapes in the module's terms: ``G`` groups, ``k`` taps, ``B`` scales."""

    weight: Tensor  # (O, I, k)
    average: Tensor  # (O, I)
    prior: Tensor  # (O, I)
    product: Tensor  # (O, I, k), any strides: the product of the 1x1 and the kxk
    point: Tensor | None  # (O, I)
    pointwise: Tensor  # (O, I, T)
    depthwise: Tensor  # (G*I, T, k)
    scales: Tensor  # (B, O); B = 6, without `point` 5
    cosines: Tensor  # (O, k), not learned
    centre: int  # the tap of `point`


class OrepaParameters(NamedTuple):
    """The same as the layer has it, kernels ``(outputs, inputs of a group, *size)``; ``1*`` is a 1 for each of size.

    ``F`` filters, ``W`` channels between the stacked kernels: I, or twice as many.
    """

    weight: Tensor  # (O, I, *size)
    average: Tensor  # (O, I, 1*)
    prior: Tensor  # (O, I, 1*)
    inner: Tensor  # (G*W, I, 1*), what is added to an identity: the 1x1 before the kxk
    second: Tensor  # (O, W, *size), the kxk
    point: Tensor | None  # (O, I, 1*)
    depthwise: Tensor  # (G*I*F, 1, *size)
    pointwise: Tensor  # (O, I*F, 1*)
    scales: Tensor  # as above, and so the rest
    cosines: Tensor
    centre: int


class _Torch:
    """`foldconv.formulas.Primitives` of torch."""

    matmul = staticmethod(torch.matmul)

    @staticmethod
    def first_taps(x: Tensor, taps: int) -> Tensor:
        return x[:, :, :taps]


TORCH = _Torch()


def depthwise(taps: Tensor, D: Tensor, groups: int) -> Tensor:
    """See `foldconv.ops.compose_depthwise`."""
    _, k, multiplier = D.shape
    flat = taps.flatten(2)
    if groups == 1 and k == multiplier and taps.device.type == "cpu":
        # The same formula in the fewest operations: for small layers these are all that it costs.
        rows = flat.transpose(0, 1)
        return torch.baddbmm(rows, rows, D.transpose(1, 2)).transpose(0, 1).reshape(taps.shape)
    return shaped(_ours(formulas.doconv(_common(flat, groups), D.unflatten(0, (groups, -1)), k, TORCH)), taps)


def shaped(kernel: Tensor, taps: Tensor) -> Tensor:
    """DO-Conv's kernel with its positions in as many dimensions as the taps have theirs."""
    return kernel if taps.dim() == 3 else kernel.reshape(taps.shape)


def pointwise(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """A 1×1 kernel before a k×k: ``K[o, i, m] = Σ_t second[o, t, m] · first[g, t, i]``

    Args:
        first: ``(G, T, I)``, the 1×1 of each group.
        second: ``(O, T, k)``, its positions flattened.
        groups: G.

    Returns:
        ``(O, I, k)``.

    Example:
        >>> second = torch.randn(8, 4, 9)
        >>> torch.equal(pointwise(torch.eye(4)[None], second, 1), second)
        True
    """
    out, inner, k = second.shape
    # With the taps before the inner channels this is one product of plain matrices per group.
    rows = second.transpose(1, 2).reshape(groups, out // groups * k, inner)
    return torch.matmul(rows, first).reshape(out, k, -1).transpose(1, 2)


def passed_on(inner: Tensor) -> Tensor:
    """OREPA's 1×1 before the k×k: each input channel passed on (twice if twice as wide), plus what is learned."""
    width, inputs = inner.shape[:2]
    identity = torch.eye(inputs, dtype=inner.dtype, device=inner.device).repeat(width // inputs, 1)
    return inner + identity.reshape(inner.shape)


def orepa_of(p: OrepaParameters, groups: int) -> Orepa:
    """The branches of a layer's parameters."""
    outputs, inputs = p.weight.shape[:2]
    second, taps = p.second.flatten(2), p.depthwise.flatten(1)
    return Orepa(
        weight=p.weight.flatten(2),
        average=p.average.flatten(1),
        prior=p.prior.flatten(1),
        product=pointwise(passed_on(p.inner).reshape(groups, -1, inputs), second, groups),
        point=None if p.point is None else p.point.flatten(1),
        pointwise=p.pointwise.reshape(outputs, inputs, -1),
        depthwise=taps.reshape(groups * inputs, -1, taps.shape[1]),
        scales=p.scales,
        cosines=p.cosines,
        centre=p.centre,
    )


def orepa(p: Orepa | OrepaParameters, groups: int) -> Tensor:
    """See `foldconv.ops.compose_orepa`; in ``weight``'s shape."""
    branches = orepa_of(p, groups) if isinstance(p, OrepaParameters) else p
    return _ours(formulas.total(_orepa(branches, groups))).reshape(p.weight.shape)


def orepa_branches(p: OrepaParameters, groups: int) -> dict[str, Tensor]:
    """The scaled branches by name, in ``weight``'s shape each, which `orepa` adds."""
    branches = orepa_of(p, groups)
    return {
        name: _ours(branch).expand(branches.weight.shape).reshape(p.weight.shape)
        for name, branch in _orepa(branches, groups)
    }


def _orepa(p: Orepa, groups: int) -> Iterator[tuple[str, Tensor]]:
    k = p.weight.shape[2]
    centre = None
    if p.point is not None:
        centre = torch.zeros(1, 1, k, 1, dtype=p.weight.dtype, device=p.weight.device)
        centre[:, :, p.centre] = 1
    return formulas.orepa(
        weight=_common(p.weight, groups),
        average=_common(p.average.unsqueeze(2), groups),
        prior=_common(p.prior.unsqueeze(2), groups),
        product=_common(p.product, groups),
        point=None if p.point is None else _common(p.point.unsqueeze(2), groups),
        separable=(p.depthwise.transpose(1, 2).unflatten(0, (groups, -1)), _common(p.pointwise, groups)),
        scales=[s.reshape(groups, 1, 1, -1) for s in p.scales],
        cosines=_common(p.cosines.unsqueeze(1), groups),
        centre=centre,
        taps=k,
        p=TORCH,
    )


def _common(kernel: Tensor, groups: int) -> Tensor:
    """``(O, I, k)`` as the ``(G, I, k, o)`` of `foldconv.formulas`."""
    return kernel.unflatten(0, (groups, -1)).permute(0, 2, 3, 1)


def _ours(kernel: Tensor) -> Tensor:
    """The inverse of `_common`."""
    return kernel.permute(0, 3, 1, 2).flatten(0, 1)
