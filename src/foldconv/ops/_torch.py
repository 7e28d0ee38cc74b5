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
    """See `foldconv.ops.compose_pointwise`."""
    out, inner, k = second.shape
    # With the taps before the inner channels this is one product of plain matrices per group.
    rows = second.transpose(1, 2).reshape(groups, out // groups * k, inner)
    return torch.matmul(rows, first).reshape(out, k, -1).transpose(1, 2)


def orepa(p: Orepa, groups: int) -> Tensor:
    """See `foldconv.ops.compose_orepa`."""
    return _ours(formulas.total(_orepa(p, groups)))


def orepa_branches(p: Orepa, groups: int) -> dict[str, Tensor]:
    """The scaled branches by name, ``(O, I, k)`` each, which `orepa` adds."""
    return {name: _ours(branch).expand(p.weight.shape) for name, branch in _orepa(p, groups)}


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
