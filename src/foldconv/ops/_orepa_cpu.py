"""OREPA on the path of the CPU: a kernel of all branches in one loop, and all their gradients in another.

To compose a kernel of a small network takes some microseconds, and each call of torch's operations some more. So the
loops take the parameters as the layer has them. Where the product of the two stacked kernels is large, it is torch's,
which knows caches better.

Nothing but the parameters is kept for the backward pass: the gradient of the product's scale follows from the second
kernel and its gradient.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._buffers import empty
from ._threads import LEAST_OF_TWO, run
from ._torch import OrepaParameters, passed_on

name = "cpu"
LARGEST = 1 << 12
"""Weights of the 1×1 of a group up to which the loop computes the product: they stay in the cache then."""
_TASKS, _OUTPUTS_PER_SUM = 8, 32
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class _Plan(NamedTuple):
    """Sizes and loops for parameters of some shapes."""

    sizes: tuple[int, ...]  # outputs, groups, inputs, width, taps, filters
    multiplies: bool
    chunks: int
    compose: Any
    gradients: Any
    depthwise_gradient: Any


def orepa(p: OrepaParameters, groups: int) -> Tensor:
    """See `foldconv.ops.compose_orepa`."""
    plan = _plan(p, groups)
    outputs, _, inputs, width, taps, _ = plan.sizes
    kernel, product = empty(p.weight.shape, p.weight.dtype), None
    if not plan.multiplies:
        product = empty((groups, outputs // groups * taps, inputs), kernel.dtype)
        torch.bmm(_turned(p.second.flatten(2)).view(groups, -1, width), _of_groups(p, groups), out=product)
    given = _contiguous(*p[:-1], product)  # held until the loop is done
    run(plan.compose, kernel.numel(), *map(_address, given), kernel.data_ptr(), *plan.sizes, p.centre)
    return kernel


def orepa_gradients(grad: Tensor, p: OrepaParameters, groups: int) -> list[Tensor | None]:
    """The gradients of the tensors of `p`; none of the cosines."""
    plan = _plan(p, groups)
    outputs, _, inputs, width, taps, filters = plan.sizes
    dtype, size = grad.dtype, grad.numel()
    found = OrepaParameters(*(None if t is None else empty(t.shape, dtype) for t in p[:-2]), None, 0)  # pyright: ignore
    turned = back = None
    if not plan.multiplies:
        turned = _turned(grad.flatten(2)).view(groups, -1, inputs)
        back = empty((groups, turned.shape[1], width), dtype)
        torch.bmm(turned, _of_groups(p, groups).transpose(1, 2), out=back)
    given = _contiguous(grad, *p[:-1], turned, back)
    run(plan.gradients, size, *map(_address, (*given, *found[:-2])), *plan.sizes, p.centre)
    if turned is not None:
        second = empty((outputs, taps, width), dtype)
        torch.mul(p.second.flatten(2).transpose(1, 2), p.scales[3].view(-1, 1, 1), out=second)
        torch.bmm(second.view(groups, -1, width).transpose(1, 2), turned, out=found.inner.view(groups, width, inputs))
        sums = torch.empty((plan.chunks, *p.depthwise.shape), dtype=dtype, device="cpu")
        _, *own = given
        at = turned.data_ptr(), own[7].data_ptr(), own[8][-1].data_ptr(), sums.data_ptr()
        run(plan.depthwise_gradient, size, *at, outputs, groups, inputs, taps, filters, plan.chunks)
        found = found._replace(depthwise=sums[0] if plan.chunks == 1 else sums.sum(0))
    return [*found[:-1]]


def _plan(p: OrepaParameters, groups: int) -> _Plan:
    return _planned(p.weight.shape, groups, p.second.shape[1], p.pointwise.shape[1], p.weight.dtype)


@functools.lru_cache
def _planned(shape: torch.Size, groups: int, width: int, columns: int, dtype: torch.dtype) -> _Plan:
    from . import _orepa_numba as loops

    outputs, inputs, *size = shape
    # Sums over outputs are one thread's.
    multiplies = inputs * width <= LARGEST and math.prod(shape) < LEAST_OF_TWO
    # As many chunks as make enough tasks; their number depends on the shape only.
    tasks = groups * math.ceil(inputs / loops.BLOCK)
    chunks = max(1, min(math.ceil(_TASKS / tasks), outputs // groups // _OUTPUTS_PER_SUM))
    sizes, wide = (outputs, groups, inputs, width, math.prod(size), columns // inputs), _NUMPY[dtype]
    made = loops.compose(wide), loops.gradients(wide), loops.depthwise_gradient(wide)
    return _Plan(sizes, multiplies, chunks, *made)


def _of_groups(p: OrepaParameters, groups: int) -> Tensor:
    """The 1×1 before the k×k, ``(G, W, I)``."""
    return passed_on(p.inner).reshape(groups, -1, p.inner.shape[1])


def _turned(tensor: Tensor) -> Tensor:
    """A contiguous copy with the last two dimensions exchanged."""
    outputs, a, b = tensor.shape
    return empty((outputs, b, a), tensor.dtype).copy_(tensor.transpose(1, 2))


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
