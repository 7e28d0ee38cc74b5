"""The compositions as differentiable functions: a fast path forward and explicit backward, else torch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _torch
from ._paths import choose
from ._torch import Orepa


def compose_depthwise(taps: Tensor, D: Tensor, groups: int = 1) -> Tensor:
    """A depthwise kernel chained with a convolution's: ``K[o, i, m] = taps[o, i, m] + Σ_s D[c, m, s] · taps[o, i, s]``

    Args:
        taps: ``(O, I, S)``, S ≥ k; the convolution's kernel, its positions flattened.
        D: ``(G·I, k, S)``, what is added to the identity.
        groups: G; output o reads the channels ``c = ⌊o·G/O⌋·I + i``.

    Returns:
        ``(O, I, k)``, in the memory layout of `taps` where the path can. Differentiable any number of times.

    Source: Cao et al., "DO-Conv", TIP 2022, eq. 4.

    Example:
        >>> taps, D = torch.randn(8, 4, 9), torch.zeros(4, 9, 9)
        >>> torch.equal(compose_depthwise(taps, D), taps)
        True
    """
    path = choose(taps, D)
    if path is None:
        return _torch.depthwise(taps, D, groups)
    return _Depthwise.apply(path, groups, taps, D)  # pyright: ignore[reportReturnType]


def compose_pointwise(first: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """A 1×1 kernel before a k×k: ``K[o, i, m] = Σ_t second[o, t, m] · first[g, t, i]``

    Args:
        first: ``(G, T, I)``, the 1×1 of each group.
        second: ``(O, T, k)``, its positions flattened.
        groups: G.

    Returns:
        ``(O, I, k)``.

    Example:
        >>> second = torch.randn(8, 4, 9)
        >>> torch.equal(compose_pointwise(torch.eye(4)[None], second), second)
        True
    """
    path = choose(second, first)
    if path is None or not hasattr(path, "pointwise"):  # a GPU's products are torch's
        return _torch.pointwise(first, second, groups)
    return _Pointwise.apply(path, groups, first, second)  # pyright: ignore[reportReturnType]


def compose_orepa(p: Orepa, groups: int = 1) -> Tensor:
    """The sum of OREPA's scaled branches, ``(O, I, k)``; see `foldconv.OREPA` for the formula.

    Args:
        p: the branches; shapes at `Orepa`.
        groups: G.

    Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3.2.
    """
    path = choose(*(t for t in p if isinstance(t, Tensor)))
    if path is None:
        return _torch.orepa(p, groups)
    return _Orepa.apply(path, groups, *p)  # pyright: ignore[reportReturnType]


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, path: Any, groups: int, taps: Tensor, D: Tensor) -> Tensor:
        ctx.path, ctx.groups = path, groups
        ctx.save_for_backward(taps, D)
        return path.depthwise(taps.detach(), D.detach(), groups)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        taps, D = ctx.saved_tensors
        if torch.is_grad_enabled():  # of a gradient's gradient
            return (
                None,
                None,
                *_differentiably(lambda taps, D: _torch.depthwise(taps, D, ctx.groups), (taps, D), grads[0]),
            )
        return None, None, *ctx.path.depthwise_gradients(grads[0], taps, D, ctx.groups)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, path: Any, groups: int, first: Tensor, second: Tensor) -> Tensor:
        ctx.path, ctx.groups = path, groups
        ctx.save_for_backward(first, second)
        return path.pointwise(first.detach(), second.detach(), groups)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        first, second = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (
                None,
                None,
                *_differentiably(
                    lambda first, second: _torch.pointwise(first, second, ctx.groups), (first, second), grads[0]
                ),
            )
        return None, None, *ctx.path.pointwise_gradients(grads[0], first, second, ctx.groups)


class _Orepa(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, path: Any, groups: int, *fields: Any) -> Tensor:
        ctx.path, ctx.groups = path, groups
        ctx.centre, ctx.pointless = fields[-1], fields[4] is None
        ctx.save_for_backward(*(t for t in fields if isinstance(t, Tensor)))
        return path.orepa(Orepa._make(t.detach() if isinstance(t, Tensor) else t for t in fields), groups)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = list(ctx.saved_tensors)
        if ctx.pointless:
            saved.insert(4, None)
        p = Orepa(*saved, centre=ctx.centre)  # pyright: ignore[reportCallIssue]
        if torch.is_grad_enabled():
            found = _differentiably(lambda *fields: _torch.orepa(Orepa._make(fields), ctx.groups), tuple(p), grads[0])
        else:
            found = ctx.path.orepa_gradients(grads[0], p, ctx.groups)
        return None, None, *found[:-2], None, None  # cosines and centre are not learned


def _differentiably(compose: Any, fields: tuple[Any, ...], grad: Tensor) -> list[Tensor | None]:
    """The gradients of `fields` by torch operations, themselves differentiable."""
    wanted = [isinstance(t, Tensor) and t.requires_grad for t in fields]
    with torch.enable_grad():
        kernel = compose(*fields)
        tensors = [t for t, w in zip(fields, wanted) if w]
        found = iter(torch.autograd.grad(kernel, tensors, grad, create_graph=True))
    return [next(found) if w else None for w in wanted]
