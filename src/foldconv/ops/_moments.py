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

_aten = torch.ops.aten
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

ILL = 256.0
"""How many times its variance the mean square of a branch's terms may be: so many roundings the variance is off."""

SMALL = 2**17
"""Elements of a map up to which torch's own statistics take no longer."""


class Window(NamedTuple):
    """The convolution that the branches stand beside: its arguments, and where a 1×1 branch begins to read."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    offset: tuple[int, ...]


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
    rows = _rows(_read(x, window, size), window.groups, _layout(x))
    positions = rows.shape[0] // window.groups * rows.shape[2]
    mean = _over_batch(rows.sum(2), window.groups).div_(positions)
    second = _over_batch(torch.bmm(rows, rows.transpose(1, 2)), window.groups).div_(positions)
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
    kernel = _per_group(weight, len(mean))
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
            y = x.new_empty(len(x), len(shift), *size).contiguous(memory_format=_layout(x))
            y.copy_(_wide(shift, y).expand_as(y))
        elif main.norm is None:  # pyright: ignore[reportOptionalMemberAccess]
            y = _convolve(x, weight, shift if bias is None else bias + shift, window)
        else:
            z = _convolve(x, weight, bias, window)
            y, save_mean, save_rstd = _normed(z, gamma, shift if beta is None else beta + shift, main)  # pyright: ignore
        size = y.shape[2:]
        layout = _layout(x)
        y = y.contiguous(memory_format=layout)
        rows = _rows(_read(x, window, size), window.groups, layout)
        _add_product(_rows(y, window.groups, layout), merged, rows)
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
        layout, groups, size = _layout(x), window.groups, g.shape[2:]
        g = g.contiguous(memory_format=layout)
        rows, g_rows = _rows(_read(x, window, size), groups, layout), _rows(g, groups, layout)
        dz, d_gamma, d_bias, d_weight = g, None, None, None
        total = None
        if z is not None:
            dz, d_gamma, total = _aten.native_batch_norm_backward(
                g, z, gamma, None, None, save_mean, save_rstd, True, ctx.main_eps, [True, gamma is not None, True]
            )
        if total is None:
            total = _over_batch(g_rows.sum(2), groups).flatten()
        needs_x = ctx.needs_input_grad[0]
        dx = None
        if weight is not None:
            wanted = [needs_x, ctx.needs_input_grad[1], bias is not None]
            dx, d_weight, d_bias = _backward(dz, x, weight, bias, window, wanted)
        # From here on the 1×1 branches.
        outer = _over_batch(torch.bmm(g_rows, rows.transpose(1, 2)), groups)
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
                own = _per_group(kernel, groups)
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
        z = _convolve(x, weight, None, window)
        y, mean, rstd = _normed(z, gamma, beta, branch, into)
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
            z = _convolve(x, weight, None, window)
        dz, d_gamma, d_beta = _aten.native_batch_norm_backward(
            g, z, gamma, None, None, mean, rstd, True, ctx.eps, [True, gamma is not None, beta is not None]
        )
        wanted = [*ctx.needs_input_grad[1:3], False]
        dx, d_weight, _ = _backward(dz, x, weight, None, window, wanted)
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
        term = torch.diag_embed(scale[:, :, 0]) if kernel is None else _per_group(kernel, groups) * scale
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
    layout = _layout(x)
    whole = x.shape[2:] == size
    if whole and dx is not None:
        part = dx = dx.contiguous(memory_format=layout)
    else:
        part = x.new_empty(*x.shape[:2], *size).contiguous(memory_format=layout)
    rows = _rows(part, window.groups, layout)
    _add_product(rows, *first, beta=1 if part is dx else 0)
    _add_product(rows, *second, alpha=-1)
    part.add_(_wide(constant, part))
    if whole:
        return part
    dx = torch.zeros_like(x) if dx is None else dx
    dx[_where(window, size)].add_(part)
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
            y = _convolve(x, weight, bias, window)
            if main_eps is not None:
                y = F.batch_norm(y, None, None, gamma, beta, True, 0.0, main_eps)
        read = _read(x, window, size) if eps else x
        for e, kernel, factor, shift in zip(eps, points[::3], points[1::3], points[2::3]):
            z = read if kernel is None else _CONV[x.dim() - 2](read, kernel, groups=window.groups)
            y = y + F.batch_norm(z, None, None, factor, shift, True, 0.0, e)
        wanted = [t is not None and t.requires_grad for t in inputs]
        tensors = [t for t, w in zip(inputs, wanted) if w]
        found = iter(torch.autograd.grad(y, tensors, g, create_graph=True))
    return [next(found) if w else None for w in wanted]


# ---------------------------------------------------------------------- norms


def _normed(
    z: Tensor, gamma: Tensor | None, beta: Tensor | None, branch: Main, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``native_batch_norm`` in training mode; its output is added to `into`, if that is there."""
    found = _statistics(z, branch)
    if found is None:
        running, eps = (branch.running_mean, branch.running_var), branch.norm.eps  # pyright: ignore
        y, *found = torch.native_batch_norm(z, gamma, beta, *running, True, branch.momentum, eps)
        return y if into is None else into.add_(y), found[0], found[1]
    mean, rstd = found
    scale = rstd if gamma is None else rstd * gamma
    shift = -scale * mean if beta is None else torch.addcmul(beta, scale, mean, value=-1)
    if into is None:
        return torch.addcmul(_wide(shift, z), z, _wide(scale, z)), mean, rstd
    return into.addcmul_(z, _wide(scale, z)).add_(_wide(shift, z)), mean, rstd


def _statistics(z: Tensor, branch: Main) -> tuple[Tensor, Tensor] | None:
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


def _wide(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *(1,) * (like.dim() - 2))


# ---------------------------------------------------------------------- positions


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    if _is_product(x, weight, window):
        if x.shape[2:].numel() == 1:
            return F.linear(x.flatten(1), weight.flatten(1), bias).view(len(x), -1, *x.shape[2:])
        flat, kernel = x.flatten(2), weight.flatten(1).expand(len(x), -1, -1)
        z = torch.bmm(kernel, flat) if bias is None else torch.baddbmm(bias[:, None], kernel, flat)
        return z.view(len(x), -1, *x.shape[2:])
    return _CONV[x.dim() - 2](x, weight, bias, window.stride, window.padding, window.dilation, window.groups)


def _backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `_convolve`."""
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
    layout = _layout(x)
    if weight.shape[1] == 1 < groups and weight[0].numel() > 9 and x.dim() == 4 and x.is_contiguous():
        # The gradients of a large depthwise kernel take torch half the time so, with the copies.
        g, x = (t.contiguous(memory_format=torch.channels_last) for t in (g, x))
    dx, *others = _aten.convolution_backward(
        g, x, weight, sizes, stride, padding, dilation, False, ends, groups, wanted
    )
    return None if dx is None else dx.contiguous(memory_format=layout), *others  # pyright: ignore


def _is_product(x: Tensor, weight: Tensor, window: Window) -> bool:
    """Of matrices, which torch's convolution is no faster at, and slow for few positions."""
    plain = weight.shape[2:].numel() == 1 == window.groups and x.is_contiguous()
    return plain and not any(window.padding) and set(window.stride) == {1}


def _where(window: Window, size: Sequence[int]) -> tuple[Any, ...]:
    steps = zip(window.offset, window.stride, size)
    return (..., *(slice(o, o + s * (n - 1) + 1, s) for o, s, n in steps))


def _read(x: Tensor, window: Window, size: Sequence[int]) -> Tensor:
    """What the 1×1 branches read of `x`, in its layout."""
    return x[_where(window, size)].contiguous(memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    """The layout of `x`, or the one that it is brought into."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and not x.is_contiguous() and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def _rows(x: Tensor, groups: int, layout: torch.memory_format) -> Tensor:
    """A view of `x`, which has the layout: ``(N·G, C/G, positions)``, or ``(G, C/G, N·positions)``, channels last."""
    if layout is torch.contiguous_format:
        return x.view(len(x) * groups, x.shape[1] // groups, -1)
    return x.movedim(1, -1).view(-1, groups, x.shape[1] // groups).permute(1, 2, 0)


def _over_batch(t: Tensor, groups: int) -> Tensor:
    """``(N·G, ...)`` summed to ``(G, ...)``."""
    return t if len(t) == groups else t.view(-1, groups, *t.shape[1:]).sum(0)


def _add_product(rows: Tensor, matrix: Tensor, others: Tensor, beta: int = 1, alpha: int = 1) -> None:
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


def _per_group(weight: Tensor, groups: int) -> Tensor:
    return weight.view(groups, -1, weight.shape[1])
