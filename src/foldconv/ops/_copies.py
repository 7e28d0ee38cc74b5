"""Branches of one geometry, run as one convolution that has all their outputs, and one norm over all its channels.

A convolution of many outputs is faster than several of few, most of all where channels are few, and so are its
gradients. The maps are computed again backward, all but those of the first branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._maps import Window, convolve, convolve_backward
from ._moments import Main, Norm, batch_statistics, wide

_aten = torch.ops.aten


def are_copies(conv: Any, norm: Any, other: Any, other_norm: Any) -> bool:
    """Can these two branches, of one window that has one group, be of the same `add_copies`?"""
    if conv.weight.shape != other.weight.shape or norm.eps != other_norm.eps:
        return False
    return not any(t is None for n in (norm, other_norm) for t in (n.weight, n.bias))


def add_copies(into: Tensor | None, x: Tensor, branches: Sequence[Main], window: Window, keep: int) -> Tensor:
    """``into + Σ_b norm_b(conv_b(x))``, in place of `into`; the maps of the first `keep` branches are kept."""
    eps = branches[0].norm.eps  # pyright: ignore[reportOptionalMemberAccess]
    tensors = [t for b in branches for t in (b.weight, b.norm.weight, b.norm.bias)]  # pyright: ignore
    return _Copies.apply(into, x, branches, window, keep, eps, *tensors)  # pyright: ignore[reportReturnType]


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        into: Tensor | None,
        x: Tensor,
        branches: Sequence[Main],
        window: Window,
        keep: int,
        eps: float,
        *tensors: Tensor,
    ) -> Tensor:
        n, outputs = len(branches), len(tensors[0])
        weight, gamma, beta = (torch.cat(tensors[i::3]) for i in range(3))
        z = convolve(x, weight, None, window)
        # With a momentum of one, running statistics are those of the batch.
        batch = z.new_zeros(n * outputs), z.new_zeros(n * outputs)
        found = batch_statistics(z, Main(weight, None, Norm(gamma, beta, eps), *batch, 1.0))
        if found is None:
            y, mean, rstd = torch.native_batch_norm(z, gamma, beta, *batch, True, 1.0, eps)
            parts = y.unflatten(1, (n, outputs))
            y = parts.sum(1) if into is None else into.add_(parts.sum(1))
        else:
            mean, rstd = found
            scale = rstd * gamma
            shift = torch.addcmul(beta, scale, mean, value=-1).view(n, -1).sum(0)
            y = into
            for part, s in zip(z.split(outputs, 1), scale.split(outputs)):
                s = wide(s, z)
                y = torch.addcmul(wide(shift, z), part, s) if y is None else y.addcmul_(part, s)
            if into is not None:
                y = into.add_(wide(shift, z))
        for branch, means, variances in zip(branches, *(t.split(outputs) for t in batch)):
            if branch.running_mean is not None and branch.running_var is not None:
                branch.running_mean.lerp_(means, branch.momentum)
                branch.running_var.lerp_(variances, branch.momentum)
        kept = z[:, : keep * outputs].clone() if 0 < keep < n else z if keep else None
        ctx.save_for_backward(x, mean, rstd, kept, *tensors)
        ctx.window, ctx.eps, ctx.adds, ctx.keep = window, eps, into is not None, keep
        if into is not None:
            ctx.mark_dirty(y)
        return y  # pyright: ignore[reportReturnType]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, mean, rstd, kept, *tensors = ctx.saved_tensors
        (g,), window, keep, n, outputs = grads, ctx.window, ctx.keep, len(tensors) // 3, len(tensors[0])
        before, nothing = g if ctx.adds else None, (None,) * 4
        if torch.is_grad_enabled():  # of a gradient's gradient
            with torch.enable_grad():
                y: Any = 0
                for weight, gamma, beta in zip(tensors[::3], tensors[1::3], tensors[2::3]):
                    y = y + F.batch_norm(convolve(x, weight, None, window), None, None, gamma, beta, True, 0.0, ctx.eps)
                wanted = [t.requires_grad for t in (x, *tensors)]
                inputs = [t for t, w in zip((x, *tensors), wanted) if w]
                found = iter(torch.autograd.grad(y, inputs, g, create_graph=True))
            dx, *found = [next(found) if w else None for w in wanted]
            return before, dx, *nothing, *found
        weight, gamma = torch.cat(tensors[::3]), torch.cat(tensors[1::3])
        if keep < n:
            z = convolve(x, weight[keep * outputs :], None, window)
            z = z if kept is None else torch.cat([kept, z], 1)
        else:
            z = kept
        repeated = torch.cat([g] * n, 1)
        dz, d_gamma, d_beta = _aten.native_batch_norm_backward(
            repeated, z, gamma, None, None, mean, rstd, True, ctx.eps, [True, True, True]
        )
        needed = ctx.needs_input_grad
        wanted = [needed[1], any(needed[6::3]), False]
        dx, d_weight, _ = convolve_backward(dz, x, weight, None, window, wanted)
        parts = (d_weight, d_gamma, d_beta)
        split = zip(*((None,) * n if t is None else t.split(outputs) for t in parts))
        return before, dx, *nothing, *(t for branch in split for t in branch)
