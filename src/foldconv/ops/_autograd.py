"""The compositions as differentiable functions: a fast path forward and explicit backward, else torch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
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

    Raises:
        UnsupportedError: for shapes that do not fit each other; here and below, before a path is picked.

    Source: Cao et al., "DO-Conv", TIP 2022, eq. 4.

    Example:
        >>> taps, D = torch.randn(8, 4, 9), torch.zeros(4, 9, 9)
        >>> torch.equal(compose_depthwise(taps, D), taps)
        True
    """
    out, per_group, multiplier = taps.shape
    _expect("taps", taps, {"D": (D, (groups * per_group, None, multiplier))}, out, groups)
    path = choose(taps, D)
    if path is None:
        return _torch.depthwise(taps, D, groups)
    return _OnPath.apply(path, "depthwise", groups, taps, D)  # pyright: ignore[reportReturnType]


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
    _expect("second", second, {"first": (first, (groups, second.shape[1], None))}, second.shape[0], groups)
    path = choose(second, first)
    if path is None or not hasattr(path, "pointwise"):  # a GPU's products are torch's
        return _torch.pointwise(first, second, groups)
    return _OnPath.apply(path, "pointwise", groups, first, second)  # pyright: ignore[reportReturnType]


def compose_orepa(p: Orepa, groups: int = 1) -> Tensor:
    """The sum of OREPA's scaled branches, ``(O, I, k)``; see `foldconv.OREPA` for the formula.

    Args:
        p: the branches; shapes at `Orepa`.
        groups: G.

    Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3.2.
    """
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
    path = choose(*(t for t in p if isinstance(t, Tensor)))
    if path is None:
        return _torch.orepa(p, groups)
    return _OnPath.apply(path, "orepa", groups, *p)  # pyright: ignore[reportReturnType]


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


class _OnPath(torch.autograd.Function):
    """A composition by a path; `fields` are what it is composed from, tensors and others."""

    @staticmethod
    def forward(ctx: Any, path: Any, name: str, groups: int, *fields: Any) -> Tensor:
        # Not ctx.name: that is what a node of the graph is called, for those who walk it.
        ctx.path, ctx.composition, ctx.groups = path, name, groups
        ctx.others = [None if isinstance(f, Tensor) else f for f in fields]
        ctx.save_for_backward(*(f if isinstance(f, Tensor) else None for f in fields))
        detached = tuple(f.detach() if isinstance(f, Tensor) else f for f in fields)
        return getattr(path, name)(*_arguments(name, detached), groups)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        fields = tuple(other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others))
        if torch.is_grad_enabled():  # of a gradient's gradient
            found = _differentiably(ctx.composition, ctx.groups, fields, grads[0])
        else:
            gradients = getattr(ctx.path, f"{ctx.composition}_gradients")
            found = gradients(grads[0], *_arguments(ctx.composition, fields), ctx.groups)
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *(gradient if w else None for gradient, w in zip(found, wanted))


def _arguments(name: str, fields: tuple[Any, ...]) -> tuple[Any, ...]:
    """The fields as a path takes them."""
    return (Orepa._make(fields),) if name == "orepa" else fields


def _differentiably(name: str, groups: int, fields: tuple[Any, ...], grad: Tensor) -> list[Tensor | None]:
    """The gradients of `fields` by torch operations, themselves differentiable."""
    wanted = [isinstance(f, Tensor) and f.requires_grad for f in fields]
    with torch.enable_grad():
        kernel = getattr(_torch, name)(*_arguments(name, fields), groups)
        tensors = [f for f, w in zip(fields, wanted) if w]
        found = iter(torch.autograd.grad(kernel, tensors, grad, create_graph=True))
    return [next(found) if w else None for w in wanted]
