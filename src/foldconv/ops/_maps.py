"""Maps of any layout: the convolution and its gradients as `_moments.py` runs them, and maps as rows of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra.convolutions import CONV
from ._depthwise import is_large_depthwise, weight_gradient

_aten = torch.ops.aten


class Window(NamedTuple):
    """The convolution that the branches stand beside: its arguments, and where a 1×1 branch begins to read."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    offset: tuple[int, ...]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    if _is_product(x, weight, window):
        if x.shape[2:].numel() == 1:
            return F.linear(x.flatten(1), weight.flatten(1), bias).view(len(x), -1, *x.shape[2:])
        flat, kernel = x.flatten(2), weight.flatten(1).expand(len(x), -1, -1)
        z = torch.bmm(kernel, flat) if bias is None else torch.baddbmm(bias[:, None], kernel, flat)
        return z.view(len(x), -1, *x.shape[2:])
    return CONV[x.dim() - 2](x, weight, bias, window.stride, window.padding, window.dilation, window.groups)


def convolve_backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `convolve`."""
    if _is_product(x, weight, window):
        flat, kernel, rows = g.flatten(2), weight.flatten(1), x.flatten(2).transpose(1, 2)
        if x.shape[2:].numel() == 1:
            dx = flat[:, :, 0] @ kernel if wanted[0] else None
            d_weight = flat[:, :, 0].t() @ rows[:, 0] if wanted[1] else None
        else:
            dx = torch.bmm(kernel.t().expand(len(x), -1, -1), flat) if wanted[0] else None
            d_weight = torch.bmm(flat, rows).sum(0) if wanted[1] else None
        shaped = (None if t is None else t.view_as(like) for t, like in ((dx, x), (d_weight, weight)))
        return *shaped, flat.sum((0, 2)) if wanted[2] else None  # pyright: ignore[reportReturnType]
    sizes, ends = None if bias is None else [len(bias)], [0] * (x.dim() - 2)
    stride, padding, dilation, groups, _ = window
    layout = layout_of(x)
    own = None
    if is_large_depthwise(weight, groups):
        # Channels last torch takes half the time, too, with the copies.
        g, x = (t.contiguous(memory_format=torch.channels_last) for t in (g, x))
        own = weight_gradient(g, x, weight, window) if wanted[1] else None
        wanted = [wanted[0], wanted[1] and own is None, wanted[2]]
    dx, *others = _aten.convolution_backward(
        g, x, weight, sizes, stride, padding, dilation, False, ends, groups, wanted
    )
    d_weight, d_bias = (None if t is None or not w else t for t, w in zip(others, wanted[1:]))
    d_weight = d_weight if own is None else own
    return None if dx is None else dx.contiguous(memory_format=layout), d_weight, d_bias


def _is_product(x: Tensor, weight: Tensor, window: Window) -> bool:
    """Of matrices, which torch's convolution is no faster at, and slow for few positions."""
    plain = weight.shape[2:].numel() == 1 == window.groups and x.is_contiguous()
    return plain and not any(window.padding) and set(window.stride) == {1}


def where_read(window: Window, size: Sequence[int]) -> tuple[Any, ...]:
    steps = zip(window.offset, window.stride, size)
    return (..., *(slice(o, o + s * (n - 1) + 1, s) for o, s, n in steps))


def read_at(x: Tensor, window: Window, size: Sequence[int]) -> Tensor:
    """What the 1×1 branches read of `x`, in its layout."""
    return x[where_read(window, size)].contiguous(memory_format=layout_of(x))


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout of `x`, or the one that it is brought into."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and not x.is_contiguous() and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """`x` in a layout, its gradient in the layout of `x`."""
    return _LaidOut.apply(x, layout)  # pyright: ignore[reportReturnType]


class _LaidOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: torch.memory_format) -> Tensor:
        ctx.layout = layout_of(x)
        return x.clone(memory_format=layout)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].contiguous(memory_format=ctx.layout), None


def rows_of(x: Tensor, groups: int, layout: torch.memory_format) -> Tensor:
    """A view of `x`, which has the layout: ``(N·G, C/G, positions)``, or ``(G, C/G, N·positions)``, channels last."""
    if layout is torch.contiguous_format:
        return x.view(len(x) * groups, x.shape[1] // groups, -1)
    return x.movedim(1, -1).view(-1, groups, x.shape[1] // groups).permute(1, 2, 0)


def over_batch(t: Tensor, groups: int) -> Tensor:
    """``(N·G, ...)`` summed to ``(G, ...)``."""
    return t if len(t) == groups else t.view(-1, groups, *t.shape[1:]).sum(0)


def add_product(rows: Tensor, matrix: Tensor, others: Tensor, beta: int = 1, alpha: int = 1) -> None:
    """``rows = beta·rows + alpha·matrix @ others``, a matrix per group."""
    matrix = _repeated(matrix, rows)
    if matrix.shape[1:] != (1, 1):
        rows.baddbmm_(matrix, others, beta=beta, alpha=alpha)
    elif beta:
        rows.addcmul_(others, matrix, value=alpha)
    else:
        torch.mul(others, matrix if alpha == 1 else matrix * alpha, out=rows)


def _repeated(matrix: Tensor, rows: Tensor) -> Tensor:
    """A matrix per group for each of the rows' batch."""
    batch = len(rows) // len(matrix)
    return matrix.expand(batch, *matrix.shape).flatten(0, 1) if len(matrix) > 1 else matrix.expand(batch, -1, -1)


def per_group(weight: Tensor, groups: int) -> Tensor:
    return weight.view(groups, -1, weight.shape[1])
