"""1×1 branches with norms, from the moments of their input: `add_points` runs one 1×1 convolution for all of them.

In training mode a norm subtracts the batch's mean and divides by its standard deviation. For ``z = W x`` both follow
from the mean x̄ and the covariance Σ of the input's channels, over all P positions of the batch:

    μ = W x̄        σ² = diag(W Σ Wᵀ) + ε        and the identity has W = I

With r = 1/σ and s = γ r, all branches b together are one 1×1 convolution:

    Σ_b s_b ∘ (W_b x - μ_b) + β_b = M x + c        M = Σ_b diag(s_b) W_b        c = Σ_b β_b - M x̄

Backward, from g: with G = Σ_p g_p (x_p - x̄)ᵀ and ḡ the mean of g, dz_b = s_b (g - ḡ) - s_b r_b dγ_b (z_b - μ_b) / P, so

    dγ_b = r_b ∘ diag(G W_bᵀ)        dβ_b = P ḡ        dW_b = s_b ∘ (G - (r_b dγ_b) ∘ W_b Σ)
    dx   = Mᵀ (g - ḡ) - Q (x - x̄)    Q = Σ_b W_bᵀ diag(s_b r_b dγ_b / P) W_b

No branch has a map of its own, forward or backward. What they are added to is a convolution with its norm: both are
torch's, and c goes into that norm's shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra.convolutions import CONV
from ._maps import (
    Window,
    add_product,
    convolve,
    convolve_backward,
    layout_of,
    over_batch,
    per_group,
    read_at,
    rows_of,
    where_read,
)

_aten = torch.ops.aten

ILL = 256.0
"""How many times its variance the mean square of a branch's terms may be: so many roundings the variance is off."""

SMALL = 2**17
"""Elements of a map up to which torch's own statistics take no longer."""


class Norm(NamedTuple):
    """A batch norm in training mode: tensors (None: it has none), eps."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Main(NamedTuple):
    """A convolution, its norm if it has one, and what that norm does to its running statistics."""

    weight: Tensor
    bias: Tensor | None
    norm: Norm | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float


class Moments(NamedTuple):
    """Of the channels of `x` where 1×1 branches read it, per group: mean ``(G, I)`` and covariance ``(G, I, I)``."""

    mean: Tensor
    covariance: Tensor
    positions: int


def moments_of(x: Tensor, window: Window, size: Sequence[int]) -> Moments:
    """The moments over the positions that outputs of `size` read."""
    rows = rows_of(read_at(x, window, size), window.groups, layout_of(x))
    positions = rows.shape[0] // window.groups * rows.shape[2]
    mean = over_batch(rows.sum(2), window.groups).div_(positions)
    second = over_batch(torch.bmm(rows, rows.transpose(1, 2)), window.groups).div_(positions)
    return Moments(mean, second.baddbmm_(mean[:, :, None], mean[:, None, :], alpha=-1), positions)


def statistics(moments: Moments, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and conditioning of a branch's outputs, ``(O,)`` each; `weight` None: of the identity.

    The variance is a difference of squares: from the third on its rounding error is read, the mean square of its terms.
    """
    mean, covariance, _ = moments
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    square = diagonal + mean * mean
    if weight is None:
        return mean.flatten(), diagonal.flatten().clamp_min(0), square.flatten()
    kernel = per_group(weight, len(mean))
    variance = torch.bmm(kernel, covariance).mul_(kernel).sum(2)
    means, terms = (torch.bmm(t, v[:, :, None]) for t, v in ((kernel, mean), (kernel * kernel, square)))
    return means.flatten(), variance.flatten().clamp_min_(0), terms.flatten()


def add_points(
    x: Tensor,
    main: Main | None,
    points: Sequence[tuple[Tensor | None, Norm]],
    moments: Moments,
    variances: Sequence[Tensor],
    window: Window,
) -> Tensor:
    """``norm(conv(x)) + Σ_b norm_b(W_b x)``, differentiable; a gradient of its gradient is computed by branches.

    Args:
        x: ``(N, C, *spatial)``, of floats of at least 32 bits, as all tensors here.
        main: the convolution and its norm, None where all branches are 1×1.
        points: the 1×1 kernels, ``(O, C/G, 1, ...)``, and their norms; a kernel None is the identity.
        moments, variances: `moments_of` the input, `statistics` of each of the points.
    """
    norms = [norm for _, norm in points]
    eps = [norm.eps for norm in norms]
    tensors: list[Tensor | None] = [*moments[:2], *variances]
    for weight, norm in points:
        tensors += [weight, norm.weight, norm.bias]
    return _Points.apply(x, *_flat(main), window, moments.positions, main, eps, *tensors)  # pyright: ignore


def _flat(main: Main | None) -> tuple[Tensor | None, ...]:
    if main is None:
        return (None,) * 4
    norm = main.norm or Norm(None, None, 0.0)
    return main.weight, main.bias, norm.weight, norm.bias


class _Points(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        window: Window,
        positions: int,
        main: Main | None,
        eps: list[float],
        *tensors: Any,
    ) -> Tensor:
        (mean, covariance), variances, points = tensors[:2], tensors[2 : 2 + len(eps)], tensors[2 + len(eps) :]
        merged, scales = _merged(mean, covariance, variances, points, eps)
        shift = -torch.bmm(merged, mean[:, :, None]).flatten()
        for b in points[2::3]:
            shift = shift if b is None else shift + b
        z = save_mean = save_rstd = None
        if weight is None:
            size = [(n - 1) // s + 1 for n, s in zip(x.shape[2:], window.stride)]
            y = x.new_empty(len(x), len(shift), *size).contiguous(memory_format=layout_of(x))
            y.copy_(wide(shift, y).expand_as(y))
        elif main.norm is None:  # pyright: ignore[reportOptionalMemberAccess]
            y = convolve(x, weight, shift if bias is None else bias + shift, window)
        else:
            z = convolve(x, weight, bias, window)
            y, save_mean, save_rstd = normed(z, gamma, shift if beta is None else beta + shift, main)  # pyright: ignore
        size = y.shape[2:]
        layout = layout_of(x)
        y = y.contiguous(memory_format=layout)
        rows = rows_of(read_at(x, window, size), window.groups, layout)
        add_product(rows_of(y, window.groups, layout), merged, rows)
        ctx.save_for_backward(
            x, weight, bias, gamma, beta, z, save_mean, save_rstd, merged, *scales, mean, covariance, *points
        )
        ctx.window, ctx.positions, ctx.eps = window, positions, eps
        ctx.main_eps = None if main is None or main.norm is None else main.norm.eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        window, (g,), n = ctx.window, grads, len(ctx.eps)
        x, weight, bias, gamma, beta, z, save_mean, save_rstd, merged, *rest = ctx.saved_tensors
        rstds, (mean, covariance), points = rest[:n], rest[n : n + 2], rest[n + 2 :]
        nothing = (None,) * 4
        if torch.is_grad_enabled():  # of a gradient's gradient
            inputs = (x, weight, bias, gamma, beta, *points)
            found = _differentiably(window, ctx.main_eps, ctx.eps, inputs, g)
            return *found[:5], *nothing, *(None,) * (2 + n), *found[5:]
        layout, groups, size = layout_of(x), window.groups, g.shape[2:]
        g = g.contiguous(memory_format=layout)
        rows, g_rows = rows_of(read_at(x, window, size), groups, layout), rows_of(g, groups, layout)
        dz, d_gamma, d_bias, d_weight = g, None, None, None
        total = None
        if z is not None:
            dz, d_gamma, total = _aten.native_batch_norm_backward(
                g, z, gamma, None, None, save_mean, save_rstd, True, ctx.main_eps, [True, gamma is not None, True]
            )
        if total is None:
            total = over_batch(g_rows.sum(2), groups).flatten()
        needs_x = ctx.needs_input_grad[0]
        dx = None
        if weight is not None:
            wanted = [needs_x, ctx.needs_input_grad[1], bias is not None]
            dx, d_weight, d_bias = convolve_backward(dz, x, weight, bias, window, wanted)
        # From here on the 1×1 branches.
        outer = over_batch(torch.bmm(g_rows, rows.transpose(1, 2)), groups)
        by_group = total.view(groups, -1, 1)
        outer = outer.baddbmm_(by_group, mean[:, None, :], alpha=-1)
        found: list[Tensor | None] = []
        pull = torch.zeros_like(covariance)
        for r, kernel, factor in zip(rstds, points[::3], points[1::3]):
            r = r.view(groups, -1)
            s = r if factor is None else r * factor.view(groups, -1)
            if kernel is None:
                d_factor = r * outer.diagonal(dim1=1, dim2=2)
                pull.diagonal(dim1=1, dim2=2).add_(s * r * d_factor, alpha=1 / ctx.positions)
                d_kernel = None
            else:
                own = per_group(kernel, groups)
                d_factor = r * (outer * own).sum(2)
                inner = torch.baddbmm(outer, own * (r * d_factor)[:, :, None], covariance, alpha=-1)
                d_kernel = inner.mul_(s[:, :, None]).view_as(kernel)
                scaled = own * (s * r * d_factor)[:, :, None]
                pull.baddbmm_(own.transpose(1, 2), scaled, alpha=1 / ctx.positions)
            found += [d_kernel, None if factor is None else d_factor.flatten(), total]
        if needs_x:
            back = merged.transpose(1, 2)
            constant = torch.bmm(pull, mean[:, :, None]).baddbmm_(back, by_group, alpha=-1 / ctx.positions)
            dx = _pulled_back(x, dx, window, size, (back, g_rows), (pull, rows), constant)
        return (
            dx,
            d_weight,
            d_bias,
            d_gamma,
            None if beta is None else total,
            *nothing,
            *(None,) * (2 + n),
            *(d if p is not None else None for d, p in zip(found, points)),
        )


def add_window(y: Tensor | None, x: Tensor, branch: Main, window: Window, keep: bool) -> Tensor:
    """``y + norm(conv(x))``, into `y`; without `keep` the convolution runs again backward, and its map is not kept."""
    assert branch.norm is not None
    return _Window.apply(y, x, branch.weight, branch.norm.weight, branch.norm.bias, branch, window, keep)  # pyright: ignore


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        into: Tensor | None,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        branch: Main,
        window: Window,
        keep: bool,
    ) -> Tensor:
        z = convolve(x, weight, None, window)
        y, mean, rstd = normed(z, gamma, beta, branch, into)
        ctx.save_for_backward(x, weight, gamma, beta, mean, rstd, z if keep else None)
        ctx.window, ctx.eps, ctx.adds = window, branch.norm.eps, into is not None  # pyright: ignore
        if into is not None:
            ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, gamma, beta, mean, rstd, z = ctx.saved_tensors
        (g,), window = grads, ctx.window
        if torch.is_grad_enabled():  # of a gradient's gradient
            found = _differentiably(window, ctx.eps, (), (x, weight, None, gamma, beta), g)
            return g if ctx.adds else None, found[0], found[1], found[3], found[4], None, None, None
        if z is None:
            z = convolve(x, weight, None, window)
        dz, d_gamma, d_beta = _aten.native_batch_norm_backward(
            g, z, gamma, None, None, mean, rstd, True, ctx.eps, [True, gamma is not None, beta is not None]
        )
        wanted = [*ctx.needs_input_grad[1:3], False]
        dx, d_weight, _ = convolve_backward(dz, x, weight, None, window, wanted)
        return g if ctx.adds else None, dx, d_weight, d_gamma, d_beta, None, None, None


def _merged(
    mean: Tensor, covariance: Tensor, variances: Sequence[Tensor], points: Sequence[Any], eps: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """M, ``(G, O/G, I)``, and r of each branch."""
    groups, merged, rstds = len(mean), None, []
    for variance, e, kernel, factor in zip(variances, eps, points[::3], points[1::3]):
        r = (variance + e).rsqrt_()
        rstds.append(r)
        scale = (r if factor is None else r * factor).view(groups, -1, 1)
        term = torch.diag_embed(scale[:, :, 0]) if kernel is None else per_group(kernel, groups) * scale
        merged = term if merged is None else merged.add_(term)
    assert merged is not None
    return merged, rstds


def _pulled_back(
    x: Tensor,
    dx: Tensor | None,
    window: Window,
    size: torch.Size,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    constant: Tensor,
) -> Tensor:
    """``dx`` (None: zeros) with ``first - second + constant`` added where the 1×1 branches read."""
    layout = layout_of(x)
    whole = x.shape[2:] == size
    if whole and dx is not None:
        part = dx = dx.contiguous(memory_format=layout)
    else:
        part = x.new_empty(*x.shape[:2], *size).contiguous(memory_format=layout)
    rows = rows_of(part, window.groups, layout)
    add_product(rows, *first, beta=1 if part is dx else 0)
    add_product(rows, *second, alpha=-1)
    part.add_(wide(constant, part))
    if whole:
        return part
    dx = torch.zeros_like(x) if dx is None else dx
    dx[where_read(window, size)].add_(part)
    return dx


def _differentiably(
    window: Window, main_eps: float | None, eps: Sequence[float], inputs: Sequence[Any], g: Tensor
) -> list[Tensor | None]:
    """The gradients of `inputs` by the branches themselves, differentiable again."""
    x, weight, bias, gamma, beta, *points = inputs
    with torch.enable_grad():
        size = g.shape[2:]
        y: Any = 0
        if weight is not None:
            y = convolve(x, weight, bias, window)
            if main_eps is not None:
                y = F.batch_norm(y, None, None, gamma, beta, True, 0.0, main_eps)
        read = read_at(x, window, size) if eps else x
        for e, kernel, factor, shift in zip(eps, points[::3], points[1::3], points[2::3]):
            z = read if kernel is None else CONV[x.dim() - 2](read, kernel, groups=window.groups)
            y = y + F.batch_norm(z, None, None, factor, shift, True, 0.0, e)
        wanted = [t is not None and t.requires_grad for t in inputs]
        tensors = [t for t, w in zip(inputs, wanted) if w]
        found = iter(torch.autograd.grad(y, tensors, g, create_graph=True))
    return [next(found) if w else None for w in wanted]


# ---------------------------------------------------------------------- norms


def normed(
    z: Tensor, gamma: Tensor | None, beta: Tensor | None, branch: Main, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``native_batch_norm`` in training mode; its output is added to `into`, if that is there."""
    found = batch_statistics(z, branch)
    if found is None:
        running, eps = (branch.running_mean, branch.running_var), branch.norm.eps  # pyright: ignore
        y, *found = torch.native_batch_norm(z, gamma, beta, *running, True, branch.momentum, eps)
        return y if into is None else into.add_(y), found[0], found[1]
    mean, rstd = found
    scale = rstd if gamma is None else rstd * gamma
    shift = -scale * mean if beta is None else torch.addcmul(beta, scale, mean, value=-1)
    if into is None:
        return torch.addcmul(wide(shift, z), z, wide(scale, z)), mean, rstd
    return into.addcmul_(z, wide(scale, z)).add_(wide(shift, z)), mean, rstd


def batch_statistics(z: Tensor, branch: Main) -> tuple[Tensor, Tensor] | None:
    """Mean and 1/σ of each channel, in a tenth of torch's time, and into the running statistics; None: rounding shows.

    torch sums in two passes; here they are sums and products.
    """
    if z.numel() <= SMALL or not z.is_contiguous():
        return None
    batch, channels = z.shape[:2]
    flat = z.view(batch * channels, 1, -1)
    count = batch * flat.shape[2]
    mean = flat.sum(2).view(batch, channels).sum(0).div_(count)
    square = torch.bmm(flat, flat.transpose(1, 2)).view(batch, channels).sum(0).div_(count)
    variance = torch.addcmul(square, mean, mean, value=-1).clamp_min_(0)
    eps = branch.norm.eps  # pyright: ignore[reportOptionalMemberAccess]
    if not bool((square <= ILL * (variance + eps)).all()):
        return None
    if branch.running_mean is not None and branch.running_var is not None:
        branch.running_mean.lerp_(mean, branch.momentum)
        branch.running_var.lerp_(variance * (count / (count - 1)), branch.momentum)
    return mean, (variance + eps).rsqrt_()


def wide(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *(1,) * (like.dim() - 2))
