"""The compositions as differentiable functions: a fast path forward and explicit backward, else torch operations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from . import _cpu, _orepa_cpu, _torch
from ._context import forced_path, is_observed
from ._paths import MOST_DECISIONS, decide, decided
from ._torch import Orepa, OrepaParameters


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


def compose_orepa(p: OrepaParameters | Orepa, groups: int = 1) -> Tensor:
    """The sum of OREPA's scaled branches, in ``weight``'s shape; see `foldconv.OREPA` for the formula.

    Args:
        p: a layer's parameters, or branches of which the stacked kernels are one already; shapes at `OrepaParameters`
            and `Orepa`.
        groups: G.

    Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3.2.
    """
    *tensors, centre = p
    if isinstance(p, Orepa):
        path = decide(_check_orepa, groups, *tensors)
        if path is not None and hasattr(path, "orepa"):
            return _Orepa.apply(path, Orepa, groups, centre, *tensors)  # pyright: ignore[reportReturnType]
        return _torch.orepa(p, groups)
    path = decide(_check_orepa_parameters, groups, *tensors)
    if path is None:
        return _torch.orepa(p, groups)
    if path is _cpu:
        return _Orepa.apply(_orepa_cpu, OrepaParameters, groups, centre, *tensors)  # pyright: ignore[reportReturnType]
    # A GPU's products are torch's.
    return compose_orepa(_torch.orepa_of(p, groups), groups).reshape(p.weight.shape)


def compose_orepa_compiled(p: OrepaParameters, groups: int) -> Tensor | None:
    """`compose_orepa` where it composed such parameters before, by Numba, and nothing looks on; None elsewhere."""
    *tensors, centre = p
    if is_observed() or decided(_check_orepa_parameters, groups, *tensors) is not _cpu:
        return None
    return _Orepa.apply(_orepa_cpu, OrepaParameters, groups, centre, *tensors)  # pyright: ignore[reportReturnType]


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


def _check_orepa_parameters(*fields: Any) -> None:
    *tensors, groups = fields
    p = OrepaParameters(*tensors, centre=0)
    out, per_group, *size = p.weight.shape
    one = (1,) * len(size)
    width = max(1, p.second.shape[1] // per_group) * per_group
    filters = max(1, p.depthwise.shape[0] // (groups * per_group))
    point = (out, per_group, *one)
    wanted = {
        "average": (p.average, point),
        "prior": (p.prior, point),
        "inner": (p.inner, (groups * width, per_group, *one)),
        "second": (p.second, (out, width, *size)),
        "point": (p.point, point),
        "depthwise": (p.depthwise, (groups * per_group * filters, 1, *size)),
        "pointwise": (p.pointwise, (out, per_group * filters, *one)),
        "scales": (p.scales, (5 if p.point is None else 6, out)),
        "cosines": (p.cosines, (out, math.prod(size))),
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


class _Orepa(torch.autograd.Function):
    """`compose_orepa` by a path, from the tensors of an `Orepa` or `OrepaParameters` (None for one that is missing)."""

    @staticmethod
    def forward(ctx: Any, path: Any, kind: Any, groups: int, centre: int, *tensors: Tensor | None) -> Tensor:
        ctx.how = path, kind, groups, centre
        ctx.shapes = _shapes(tensors)
        ctx.save_for_backward(*tensors)
        return path.orepa(kind(*tensors, centre), groups)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        path, kind, groups, centre = ctx.how
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():

            def compose(*inputs: Any) -> Tensor:
                return _torch.orepa(kind(*inputs[:-1], centre), inputs[-1])

            found = _differentiably(compose, tensors, groups, grads[0])
        else:
            if _shapes(tensors) != ctx.shapes:
                raise UnsupportedError("OREPA: other tensors were put in between the forward and the backward")
            found = path.orepa_gradients(grads[0], kind(*tensors, centre), groups)
        return None, None, None, None, *(gradient if w else None for gradient, w in zip(found, wanted))


def _shapes(tensors: Sequence[Tensor | None]) -> list[torch.Size | None]:
    return [None if t is None else t.shape for t in tensors]


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
