"""A 1×1 convolution, a norm, a window that pads, a norm: computed from the moments of the input, which alone is kept.

With the mean x̄ and the covariance Σ of the input's channels (`moments`), the first two are one 1×1 convolution
``M x + c`` with ``M = diag(s) W``, ``c = β - s ∘ W x̄``, ``s = γ / √(diag(W Σ Wᵀ) + ε)`` (`normalizing`): its map is
computed again backward. Small matrices are left to torch's autograd, M, c and the moments have gradients written here.

An average a(·) over the window commutes with ``M x + c``, up to the padding: with q the share of the window that lies
inside, it is ``M a(x) + c q``, whose mean and variance follow from the moments of (a(x), q) (`add_average`): the norm
behind the window needs no map either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra.convolutions import CONV
from ._maps import Window, add_product, convolve, convolve_backward, layout_of, over_batch, rows_of
from ._moments import Main, Norm, normed

_aten = torch.ops.aten


class Average(NamedTuple):
    """What `add_average` found of its branch: mean, variance and conditioning (`statistics`) before the last norm."""

    mean: Tensor
    variance: Tensor
    terms: Tensor


def moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean ``(G, I)`` and covariance ``(G, I, I)`` of the channels of `x` per group, differentiable."""
    return _Moments.apply(x, groups)  # pyright: ignore[reportReturnType]


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        mean, covariance = _mean_and_covariance(rows_of(_laid(x), groups, layout_of(x)), groups)
        ctx.save_for_backward(x, mean)
        ctx.groups = groups
        return mean, covariance

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, mean), groups, layout = ctx.saved_tensors, ctx.groups, layout_of(ctx.saved_tensors[0])
        if torch.is_grad_enabled():  # of a gradient's gradient
            mean = x.unflatten(1, (groups, -1)).flatten(3).mean((0, 3))
        positions = x.numel() // mean.numel()
        d_mean, both = grads[0] / positions, (grads[1] + grads[1].transpose(1, 2)) / positions
        constant = d_mean[:, :, None] - torch.bmm(both, mean[:, :, None])
        if torch.is_grad_enabled():
            return torch.einsum("gij,ngj...->ngi...", both, x.unflatten(1, (groups, -1))).add(
                constant.view(*mean.shape, *(1,) * (x.dim() - 2))
            ).flatten(1, 2), None
        return _affine(_laid(x), both, constant, groups, layout), None


def normalizing(
    mean: Tensor, covariance: Tensor, kernel: Tensor, factor: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """M, ``(G, O/G, I)``, and c, ``(G, O/G)``, of a 1×1 convolution and its norm; `kernel` is ``(G, O/G, I)``."""
    variance = (torch.bmm(kernel, covariance) * kernel).sum(2)
    scale = (variance.clamp_min(0) + eps).rsqrt()
    if factor is not None:
        scale = scale * factor.view_as(scale)
    merged = kernel * scale[:, :, None]
    centre = -torch.bmm(merged, mean[:, :, None])[:, :, 0]
    return merged, centre if shift is None else centre + shift.view_as(centre)


def add_window_of_point(
    into: Tensor | None, x: Tensor, merged: Tensor, constant: Tensor, branch: Main, window: Window
) -> Tensor:
    """``into + norm(conv(M x + c))``, in place of `into`; the bias, which the norm takes away, gets no gradient."""
    assert branch.norm is not None
    tensors = (branch.weight, branch.norm.weight, branch.norm.bias)
    return _PointWindow.apply(into, x, merged, constant, *tensors, branch, window)  # pyright: ignore


class _PointWindow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        into: Tensor | None,
        x: Tensor,
        merged: Tensor,
        constant: Tensor,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        branch: Main,
        window: Window,
    ) -> Tensor:
        inner = _affine(_laid(x), merged, constant[:, :, None], len(merged), layout_of(x))
        z = convolve(inner, weight, branch.bias, window)
        y, mean, rstd = normed(z, gamma, beta, branch, into)
        ctx.save_for_backward(x, merged, constant, weight, gamma, beta, z, mean, rstd)
        ctx.window, ctx.eps, ctx.adds = window, branch.norm.eps, into is not None  # pyright: ignore
        if into is not None:
            ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), window, groups = grads, ctx.window, len(ctx.saved_tensors[1])
        x, merged, constant, weight, gamma, beta, z, mean, rstd = ctx.saved_tensors
        before = g if ctx.adds else None
        if torch.is_grad_enabled():  # of a gradient's gradient
            with torch.enable_grad():
                inputs = x, merged, constant, weight, gamma, beta = _apart(x, merged, constant, weight, gamma, beta)
                inner = _mixed(x, merged, constant)
                y = convolve(inner, weight, None, window)
                y = F.batch_norm(y, None, None, gamma, beta, True, 0.0, ctx.eps)
            return before, *_gradients(y, inputs, g), None, None
        layout = layout_of(x)
        x = _laid(x)
        inner = _affine(x, merged, constant[:, :, None], groups, layout)
        dz, d_gamma, d_beta = _aten.native_batch_norm_backward(
            g, z, gamma, None, None, mean, rstd, True, ctx.eps, [True, gamma is not None, beta is not None]
        )
        needed = ctx.needs_input_grad
        d_inner, d_weight, _ = convolve_backward(dz, inner, weight, None, window, [True, needed[4], False])
        rows = rows_of(_laid(d_inner, layout), groups, layout)  # pyright: ignore[reportArgumentType]
        d_merged = over_batch(torch.bmm(rows, rows_of(x, groups, layout).transpose(1, 2)), groups)
        d_constant = over_batch(rows.sum(2), groups)
        dx = None
        if needed[1]:
            dx = torch.empty_like(x)
            add_product(rows_of(dx, groups, layout), merged.transpose(1, 2), rows, beta=0)
        return before, dx, d_merged, d_constant, d_weight, d_gamma, d_beta, None, None


def add_average(
    into: Tensor | None,
    x: Tensor,
    moments: tuple[Tensor, Tensor],
    kernel: Tensor,
    inner: Norm,
    taken: Tensor,
    last: Norm,
    size: Sequence[int],
    window: Window,
    accept: Any,
) -> Tensor | None:
    """``into + last(average(inner(W x) - taken) + taken)``, in place of `into`; None: `accept` did not.

    Args:
        into: what it is added to; None: nothing.
        x, moments: the input and its moments.
        kernel, inner: W, ``(G, O/G, I)``, and its norm.
        taken: ``(O,)``, the value that pads: it is taken away before the window and put back behind it.
        last: the norm behind the average.
        size: of the average's window; `window` is its geometry, with the groups of the 1×1 convolution.
        accept: called with an `Average` before anything is added.
    """
    norms = (inner.weight, inner.bias, last.weight, last.bias)
    pooled = _Pooled.of(x, size, window)
    found = _averaging(*moments, kernel, *norms, taken, (inner.eps, last.eps), pooled)
    if not accept(Average(*(t.flatten() for t in found[3:]))):
        return None
    eps = inner.eps, last.eps
    return _Average.apply(into, x, *moments, kernel, *norms, taken, size, window, eps, pooled, found[:3])  # pyright: ignore


class _Pooled(NamedTuple):
    """The average of the input where a window reads it: rows, share of the window that lies inside, its moments."""

    rows: Tensor
    inside: Tensor
    mean: Tensor
    covariance: Tensor
    with_inside: Tensor
    inside_mean: Tensor
    inside_variance: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, x: Tensor, size: Sequence[int], window: Window) -> _Pooled:
        with torch.no_grad():
            weight, layout, groups = _ones(x, size), layout_of(x), window.groups
            pooled = _laid(_pool(x, weight, window), layout)
            inside = _inside(x, weight, window)
            rows = rows_of(pooled, groups, layout)
            mean, covariance = _mean_and_covariance(rows, groups)
            by_inside = inside - inside.mean()
            with_inside = over_batch(rows @ _repeated(by_inside, rows), groups) / (pooled.numel() // mean.numel())
            squares = by_inside.square().mean()
        return cls(rows, inside, mean, covariance, with_inside, inside.mean(), squares, pooled.shape)


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        into: Tensor | None,
        x: Tensor,
        mean: Tensor,
        covariance: Tensor,
        kernel: Tensor,
        factor: Tensor | None,
        shift: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        taken: Tensor,
        size: Sequence[int],
        window: Window,
        eps: tuple[float, float],
        pooled: _Pooled,
        found: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        merged, slope, constant = found
        layout, shape = layout_of(x), (len(x), merged.shape[0] * merged.shape[1], *pooled.shape[2:])
        # What depends on the position alone is the same for all of the batch.
        ground = torch.addcmul(constant[:, :, None], slope[:, :, None], pooled.inside).view(1, *shape[1:])
        if into is None:
            y = x.new_empty(shape).contiguous(memory_format=layout)
            y.copy_(ground.expand_as(y))
        else:
            into += ground
            y = _laid(into, layout)
        add_product(rows_of(y, window.groups, layout), merged, pooled.rows)
        if into is not None and y is not into:
            y = into.copy_(y)
        small = (pooled.rows, pooled.mean, pooled.covariance, pooled.with_inside)
        ctx.save_for_backward(x, mean, covariance, kernel, factor, shift, gamma, beta, taken, merged, *small)
        ctx.size, ctx.window, ctx.eps, ctx.adds = size, window, eps, into is not None
        if into is not None:
            ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), window, groups = grads, ctx.window, ctx.window.groups
        x, mean, covariance, kernel, factor, shift, gamma, beta, taken, merged, rows, *small = ctx.saved_tensors
        inputs, nothing = (mean, covariance, kernel, factor, shift, gamma, beta), (None,) * 6
        before, layout, weight = g if ctx.adds else None, layout_of(x), _ones(x, ctx.size)
        inside = _inside(x, weight, window)
        if torch.is_grad_enabled():  # of a gradient's gradient
            with torch.enable_grad():
                x, *inputs = _apart(x, *inputs)
                mean, covariance, kernel, factor, shift, gamma, beta = inputs
                merged, constant = normalizing(mean, covariance, kernel, factor, shift, ctx.eps[0])
                y = _mixed(_pool(x, weight, window), merged, None)
                y = y + ((constant.flatten() - taken)[:, None] * inside).view(1, -1, *y.shape[2:])
                y = F.batch_norm(y, None, None, gamma, beta, True, 0.0, ctx.eps[1])
            return before, *_gradients(y, (x, *inputs), g), *nothing
        g_rows, shape = rows_of(_laid(g, layout), groups, layout), (*x.shape[:2], *g.shape[2:])
        positions, by_inside = rows.numel() // mean.numel(), inside - inside.mean()
        d_merged = over_batch(torch.bmm(g_rows, rows.transpose(1, 2)), groups)
        sides = torch.stack([torch.ones_like(inside), inside], 1)
        d_sides = over_batch(g_rows @ _repeated(sides, g_rows), groups)
        # The small matrices once more, for their gradients.
        leaves = [t if t is None else t.detach().requires_grad_() for t in (*inputs, *small)]
        with torch.enable_grad():
            again = _Pooled(rows, inside, *leaves[7:], inside.mean(), by_inside.square().mean(), g.shape)  # pyright: ignore
            found = _averaging(*leaves[:7], taken, ctx.eps, again)[:3]  # pyright: ignore
            given = d_merged, d_sides[:, :, 1], d_sides[:, :, 0]
            wanted = [t for t in leaves if t is not None]
            gradients = iter(torch.autograd.grad(found, wanted, given))
        *gradients, d_mean, d_covariance, d_with = [None if t is None else next(gradients) for t in leaves]
        dx = None
        if ctx.needs_input_grad[1]:
            assert d_mean is not None
            assert d_covariance is not None
            assert d_with is not None
            both = (d_covariance + d_covariance.transpose(1, 2)) / positions
            ground = (d_mean / positions)[:, :, None] - torch.bmm(both, small[0][:, :, None])
            ground = torch.addcmul(ground, (d_with / positions)[:, :, None], by_inside)
            part = x.new_empty(shape).contiguous(memory_format=layout)
            part.copy_(ground.view(1, *shape[1:]).expand_as(part))
            own = rows_of(part, groups, layout)
            add_product(own, merged.transpose(1, 2), g_rows)
            add_product(own, both, rows)
            dx = convolve_backward(part, x, weight, None, window._replace(groups=x.shape[1]), [True, False, False])[0]
        return before, dx, *gradients, *nothing


def _averaging(
    mean: Tensor,
    covariance: Tensor,
    kernel: Tensor,
    factor: Tensor | None,
    shift: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    taken: Tensor,
    eps: tuple[float, float],
    pooled: _Pooled,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of ``M a + k q + c``, the branch's output: M, k, c; mean, variance and terms before its last norm."""
    merged, constant = normalizing(mean, covariance, kernel, factor, shift, eps[0])
    slope = constant - taken.view_as(constant)
    along = torch.bmm(merged, pooled.with_inside[:, :, None])[:, :, 0]
    variance = (torch.bmm(merged, pooled.covariance) * merged).sum(2)
    variance = variance + slope * (2 * along + slope * pooled.inside_variance)
    centre = torch.bmm(merged, pooled.mean[:, :, None])[:, :, 0] + slope * pooled.inside_mean
    scale = (variance.clamp_min(0) + eps[1]).rsqrt()
    if gamma is not None:
        scale = scale * gamma.view_as(scale)
    last = -scale * centre if beta is None else beta.view_as(scale) - scale * centre
    with torch.no_grad():
        square = pooled.covariance.diagonal(dim1=1, dim2=2) + pooled.mean.square()
        terms = torch.bmm(merged.square(), square[:, :, None])[:, :, 0]
        terms = terms + slope.square() * (pooled.inside_mean.square() + pooled.inside_variance)
    return merged * scale[:, :, None], slope * scale, last, centre + taken.view_as(centre), variance, terms


# ---------------------------------------------------------------------- maps


def _laid(x: Tensor, layout: torch.memory_format | None = None) -> Tensor:
    return x.contiguous(memory_format=layout_of(x) if layout is None else layout)


def _mean_and_covariance(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    positions = rows.shape[0] // groups * rows.shape[2]
    mean = over_batch(rows.sum(2), groups).div_(positions)
    second = over_batch(torch.bmm(rows, rows.transpose(1, 2)), groups).div_(positions)
    return mean, second.baddbmm_(mean[:, :, None], mean[:, None, :], alpha=-1)


def _affine(x: Tensor, matrix: Tensor, constant: Tensor, groups: int, layout: torch.memory_format) -> Tensor:
    """``matrix x + constant`` at each position; `constant` is ``(G, O/G, 1)``."""
    y = x.new_empty(len(x), groups * matrix.shape[1], *x.shape[2:]).contiguous(memory_format=layout)
    y.copy_(constant.view(-1, *(1,) * (x.dim() - 2)).expand_as(y))
    add_product(rows_of(y, groups, layout), matrix, rows_of(x, groups, layout))
    return y


def _mixed(x: Tensor, matrix: Tensor, constant: Tensor | None) -> Tensor:
    """The same in operations that have gradients of gradients."""
    kernel = matrix.reshape(-1, matrix.shape[2], *(1,) * (x.dim() - 2))
    return CONV[x.dim() - 2](x, kernel, None if constant is None else constant.flatten(), groups=len(matrix))


def _apart(*tensors: Tensor | None) -> list[Any]:
    """The tensors as inputs of a formula: one may have been computed from another, and its gradient must not go on."""
    return [t if t is None else t.view_as(t) for t in tensors]


def _gradients(y: Tensor, inputs: Sequence[Any], g: Tensor) -> list[Tensor | None]:
    wanted = [t is not None and t.requires_grad for t in inputs]
    found = iter(torch.autograd.grad(y, [t for t, w in zip(inputs, wanted) if w], g, create_graph=True))
    return [next(found) if w else None for w in wanted]


def _ones(x: Tensor, size: Sequence[int]) -> Tensor:
    """The kernel of an average over a window of `size`, channel by channel."""
    weight = x.new_empty(x.shape[1], 1, *size)
    return weight.fill_(1 / weight[0].numel())


def _pool(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    return CONV[x.dim() - 2](x, weight, None, window.stride, window.padding, 1, x.shape[1])


def _inside(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """The share of the window that lies inside, at each position."""
    return _pool(x.new_ones(1, 1, *x.shape[2:]), weight[:1], window).flatten()


def _repeated(t: Tensor, rows: Tensor) -> Tensor:
    """Values by position, for all positions of the rows: channels last, they go through the batch."""
    return t.repeat(rows.shape[2] // len(t), *(1,) * (t.dim() - 1))
