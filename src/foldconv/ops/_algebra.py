"""The always-right path: torch operations, differentiable any number of times, for every device, dtype and layout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


def depthwise(taps: Tensor, D: Tensor, groups: int) -> Tensor:
    """See `foldconv.ops.compose_depthwise`."""
    out, per_group, multiplier = taps.shape
    k = D.shape[1]
    # One product per input channel: (k, S) @ (S, outputs that read it).
    rows = taps.reshape(groups, out // groups, per_group, multiplier).permute(0, 2, 3, 1)
    added = torch.matmul(D, rows.reshape(groups * per_group, multiplier, out // groups))
    added = added.reshape(groups, per_group, k, out // groups).permute(0, 3, 1, 2)
    return taps[..., :k] + added.reshape(out, per_group, k)


def pointwise(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """See `foldconv.ops.compose_pointwise`."""
    out, inner, k = second.shape
    # With the taps before the inner channels this is one product of plain matrices per group.
    rows = second.transpose(1, 2).reshape(groups, out // groups * k, inner)
    return torch.matmul(rows, first).reshape(out, k, -1).transpose(1, 2)


def orepa(p: Orepa, groups: int) -> Tensor:
    """See `foldconv.ops.compose_orepa`."""
    out, per_group, k = p.weight.shape
    scale = iter(p.scales.reshape(-1, out, 1, 1))
    kernel = next(scale) * p.weight
    kernel = kernel + next(scale) * p.average.unsqueeze(2) / k
    kernel = kernel + next(scale) * p.prior.unsqueeze(2) * p.cosines.unsqueeze(1)
    kernel = kernel + next(scale) * p.product
    if p.point is not None:
        centre = torch.zeros(k, dtype=kernel.dtype, device=kernel.device)
        centre[p.centre] = 1
        kernel = kernel + next(scale) * p.point.unsqueeze(2) * centre
    depthwise = p.depthwise.reshape(groups, per_group, -1, k)
    pointwise = p.pointwise.reshape(groups, out // groups, per_group, -1)
    separable = torch.einsum("goit,gitm->goim", pointwise, depthwise).reshape(out, per_group, k)
    return kernel + next(scale) * separable
