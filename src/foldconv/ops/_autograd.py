"""The compositions as differentiable functions: a fast path forward and explicit backward, else torch operations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from . import _cpu, _torch
from ._context import forced_path, is_observed
from ._paths import MOST_DECISIONS, decide
from ._torch import Orepa


def compose_depthwise(taps: Tensor, D: Tensor, groups: int = 1) -> Tensor:
    """A depthwise kernel chained with a convolution's: ``K[o, i, m] = taps[o, i, m] + Σ_s D[c, m, s] · taps[o, i, s]``

    Args:
        taps: ``(O, I, S)``, S ≥ k; the convolution's kernel, its positions flattened; ``(O, I, *size)`` where S = k.
        D: ``(G·I, k, S)``, what is added to the identity.
        groups: G; output o reads the channels ``c = ⌊o·G/O⌋·I + i``.

    Returns:
        ``(O, I, k)``, or ``(O, I, *size)`` as `taps`, in their memory layout where the path can. Differentiable any
        number of times.

    Raises:
        UnsupportedError: for shapes that do not fit each other; here and below, before a path is picked.

    Source: Cao et al., "DO-Conv", TIP 2022, eq. 4.

    Example:
        >>> taps, D = torch.randn(8, 4, 9), torch.zeros(4, 9, 9)
        >>> torch.equal(compose_depthwise(taps, D), taps)
        True
    """
    path = decide(_check_depthwise, groups, taps, D)
    if path is None:
        return _torch.depthwise(taps, D, groups)
    if path is _cpu:
        if len(_compiled) >= MOST_DECISIONS:
            _compiled.clear()
        path = _cpu.small(taps, D, groups) or path
        if D.shape[1] == D.shape[2]:  # else the taps might be meant to be more
            _compiled[_kind(taps, D, groups)] = path
    return _Depthwise.apply(path, groups, taps, D)  # pyright: ignore[reportReturnType]


_compiled: dict[tuple[Any, ...], Any] = {}
"""What composes DO-Conv's kernels from tensors of a kind, where that is Numba."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compiled.clear)


def _kind(taps: Tensor, D: Tensor, groups: int) -> tuple[Any, ...]:
    """All that decides about it."""
    shapes = taps.shape, D.shape
    return groups, forced_path.get(), *shapes, type(taps), type(D), taps.dtype, D.dtype, taps.device, D.device


def compose_compiled(taps: Tensor, D: Tensor, groups: int) -> Tensor | None:
    """`compose_depthwise` where it composed such tensors before, by Numba, and nothing looks on; None elsewhere.

    Of a small network's step the way there is what counts. Numba's loops compute what they compute, autocast or not.
    """
    if is_observed():
        return None
    path = _compiled.get(_kind(taps, D, groups))
    return None if path is None else _Depthwise.apply(path, groups, taps, D)  # pyright: ignore[reportReturnType]


def _check_depthwise(taps: Tensor, D: Tensor, groups: int) -> None:
    out, per_group, *size = taps.shape
    multiplier = math.prod(size)
    k = None if len(size) == 1 else multiplier
    _expect("taps", taps, {"D": (D, (groups * per_group, k, multiplier))}, out, groups)


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
    path = decide(_check_pointwise, groups, second, first)
    if path is None or not hasattr(path, "pointwise"):  # a GPU's products are torch's
        return _torch.pointwise(first, second, groups)
    return _OnPath.apply(path, "pointwise", groups, None, first, second)  # pyright: ignore[reportReturnType]


def _check_pointwise(second: Tensor, first: Tensor, groups: int) -> None:
    _expect("second", second, {"first": (first, (groups, second.shape[1], None))}, second.shape[0], groups)


def compose_orepa(p: Orepa, groups: int = 1) -> Tensor:
    """The sum of OREPA's scaled branches, ``(O, I, k)``; see `foldconv.OREPA` for the formula.

    Args:
        p: the branches; shapes at `Orepa`.
        groups: G.

    Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3.2.
    """
    *tensors, centre = p
    path = decide(_check_orepa, groups, *tensors)
    if path is None:
        return _torch.orepa(p, groups)
    return _OnPath.apply(path, "orepa", groups, centre, *tensors)  # pyright: ignore[reportReturnType]


def _check_orepa(*fields: Any) -> None:
    *tensors, groups = fields
    p = Orepa(*tensors, centre=0)
    out, per_group, taps = p.weight.shape
    filters = p.pointwise.shape[-1]
    kernel, point = (out, per_group, taps), (out, per_group)
    wanted = {
        "average": (p.average, point),
        "prior": (p.prior, point),
        "product": (p.product, kernel),
        "point": (p.point, point),
        "pointwise": (p.pointwise, (*point, filters)),
        "depthwise": (p.depthwise, (groups * per_group, filters, taps)),
        "scales": (p.scales, (5 if p.point is None else 6, out)),
        "cosines": (p.cosines, (out, taps)),
    }
    _expect("weight", p.weight, wanted, out, groups)


def _expect(name: str, first: Tensor, others: dict[str, Any], out: int, groups: int) -> None:
    """Raise unless the other tensors have their shapes (None: any size) and the groups divide the outputs.

    Compiled loops compute addresses from one tensor's shape; with another's they read and write elsewhere.
    """
    for other, (tensor, wanted) in others.items():
        if tensor is None:
            continue
        fits = tensor.dim() == len(wanted) and all(w is None or n == w for n, w in zip(tensor.shape, wanted))
        if not fits or out % groups:
            shown = ", ".join("any" if w is None else str(w) for w in wanted)
            raise UnsupportedError(
                f"{other}: beside {name} of shape {tuple(first.shape)} in {groups} groups expected shape ({shown}), "
                f"received {tuple(tensor.shape)}"
            )


class _Depthwise(torch.autograd.Function):
    """`compose_depthwise` by a path, in as few calls as can be: in small networks these are what it costs."""

    @staticmethod
    def forward(ctx: Any, path: Any, groups: int, taps: Tensor, D: Tensor) -> Tensor:
        ctx.how = path, groups
        ctx.save_for_backward(taps, D)
        return path.depthwise(taps, D, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        path, groups = ctx.how
        taps, D = ctx.saved_tensors
        if torch.is_grad_enabled():  # of a gradient's gradient
            return None, None, *_differentiably(_torch.depthwise, (taps, D), groups, grads[0])
        return None, None, *path.depthwise_gradients(grads[0], taps, D, groups)


class _OnPath(torch.autograd.Function):
    """Another composition by a path, from tensors (None for one that is missing); `centre` is OREPA's."""

    @staticmethod
    def forward(ctx: Any, path: Any, name: str, groups: int, centre: int | None, *tensors: Tensor | None) -> Tensor:
        ctx.how = path, name, groups, centre
        ctx.save_for_backward(*tensors)
        return getattr(path, name)(*_arguments(name, centre, tensors), groups)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        path, name, groups, centre = ctx.how
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():

            def compose(*inputs: Tensor) -> Tensor:
                return getattr(_torch, name)(*_arguments(name, centre, inputs[:-1]), inputs[-1])

            found = _differentiably(compose, tensors, groups, grads[0])
        else:
            found = getattr(path, f"{name}_gradients")(grads[0], *_arguments(name, centre, tensors), groups)
        return None, None, None, None, *(gradient if w else None for gradient, w in zip(found, wanted))


def _arguments(name: str, centre: int | None, tensors: Sequence[Any]) -> Sequence[Any]:
    """The tensors as a path takes them."""
    return (Orepa(*tensors, centre),) if name == "orepa" else tensors  # pyright: ignore[reportCallIssue]


def _differentiably(
    compose: Callable[..., Tensor], tensors: Sequence[Any], groups: int, grad: Tensor
) -> list[Tensor | None]:
    """The gradients of `tensors` by torch operations, themselves differentiable."""
    wanted = [t is not None and t.requires_grad for t in tensors]
    with torch.enable_grad():
        kernel = compose(*tensors, groups)
        inputs = [t for t, w in zip(tensors, wanted) if w]
        found = iter(torch.autograd.grad(kernel, inputs, grad, create_graph=True))
    return [next(found) if w else None for w in wanted]
