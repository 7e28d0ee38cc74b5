"""`MomentSum`: a sum of branches whose 1×1 branches run as one convolution while training, where that is exact.

It decides how when its modules or its input's size have changed, and runs them, one by one, wherever they are not what
they were built as, where somebody looks (a hook, a tracer, a compiler, a function transform), where a norm does not
normalize by this batch and keep statistics of it, where rounding would show, and where the branches are faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import Sum
from ..layers.foldable import all_are_watched, is_altered
from ..ops import is_recorded
from ..ops._copies import add_copies, are_copies
from ..ops._maps import Window, laid_out
from ..ops._moments import Moments, Norm, add_points, add_window, moments_of, statistics
from ..ops._padded import moments
from ._branch_parts import (
    Branch,
    branch_of,
    follow,
    is_exact,
    is_trained,
    offset_of,
    parts_of,
    plain_window,
    sizes_of,
    window_of,
)
from ._decided import decided

_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
MAP, PASS = 100, 30
"""What a norm and an addition cost an element of a map, and what a pass over it, in multiplications of a product."""
FEW = 2**15
"""Elements of the larger of input and output up to which the branches run: calls take longer than arithmetic."""
CHEAP = 64
"""Multiplications for an element of a map that is computed again backward; of dearer maps one in three is kept."""
FEW_INPUTS = 8
"""Channels below which torch's convolution is slower with more outputs."""
SLOWER = 1.25
"""How much slower the moments may be, for the memory that they save."""


class MomentSum(Sum):
    """Branches, added; those of one tap and the identity by the moments of their input, if that is exact and faster.

    The first branch is a convolution and perhaps a norm, the others end in norms.

    Example:
        >>> branch = lambda *modules: nn.Sequential(*modules, nn.BatchNorm2d(4))
        >>> block = MomentSum(branch(nn.Conv2d(4, 4, 3, padding=1)), point=branch(nn.Conv2d(4, 4, 1, bias=False)))
        >>> block(torch.zeros(8, 4, 5, 5)).shape
        torch.Size([8, 4, 5, 5])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Run the branches on `input` and add."""
        if _is_faster_laid_out(self, input):
            output = _by_moments(self, laid_out(input, torch.channels_last))
            output = None if output is None else laid_out(output, torch.contiguous_format)
        else:
            output = _by_moments(self, input)
        return super().forward(input) if output is None else output


class SharedMoments:
    """The moments of an input, when they are asked for, once for all who ask."""

    def __init__(self, x: Tensor):
        self._x = x
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the channels in so many groups, differentiable."""
        if groups not in self._found:
            self._found[groups] = moments(self._x, groups)
        return self._found[groups]


class Step(NamedTuple):
    """What is added after the points: modules that run themselves, or branches of one geometry that run as one."""

    module: Any
    branches: list[Branch]
    window: Any
    keep: int


class Plan(NamedTuple):
    """How a block runs on inputs of one size; `steps` without the points, `instead` with all that is not the main."""

    main: Branch
    module: nn.Module
    alone: bool
    points: list[Branch]
    window: Window
    pads: list[int]
    size: list[int]
    count: int
    shares: bool
    steps: list[Step]
    instead: list[Step]


def _by_moments(block: nn.Module, x: Tensor) -> Tensor | None:
    """The sum, or None where the branches have to run."""
    if is_recorded() or _is_small(block, x) or not _is_ordinary(x):
        return None
    plan = decided(block, (x.shape, x.dtype, FEW, SLOWER), lambda: _plan(block, x))
    if plan is None:
        return None
    given, shared, main = x, SharedMoments(x), plan.main
    if plan.pads:
        x = F.pad(x, plan.pads, _MODES[main.conv.padding_mode])
    output, steps = None, plan.steps
    if plan.points:
        already = shared.of(plan.window.groups) if plan.shares else None
        output = _add_points(x, None if plan.alone else main, plan.points, plan.window, plan.size, plan.count, already)
    if output is None:
        steps = plan.instead
        if steps[0].module is plan.module:
            output, steps = plan.module(given), steps[1:]
    for module, branches, window, keep in steps:
        if window is None:
            add_to: Any = getattr(module, "add_to", None)  # it has need of the same moments
            output = output + module(given) if add_to is None else add_to(output, given, shared)
        elif len(branches) > 1:
            output = add_copies(output, given, [parts_of(b) for b in branches], window, keep)
        else:
            output = add_window(output, given, parts_of(branches[0]), window, keep=keep > 0)
    return output


def _plan(block: nn.Module, x: Tensor) -> Plan | None:
    """How the block runs on such an input; None: by its branches."""
    if not can_see(block, x):
        return None
    ndim = x.dim() - 2
    found = [(branch_of(child, ndim), child) for child in block.children()]
    main, others = found[0][0] if found else None, found[1:]
    if len(found) < 2 or main is None or main.conv is None or any(pair != (0, 0) for pair in main.padding):
        return None
    if not all(is_trained(x, branch) for branch, _ in found if branch is not None):
        return None
    if x.shape[1] != main.conv.weight.shape[1] * main.conv.groups:
        return None  # torch says so
    window, pads = window_of(main, ndim)
    spatial = [n + pads[2 * (ndim - 1 - i)] + pads[2 * (ndim - 1 - i) + 1] for i, n in enumerate(x.shape[2:])]
    size = sizes_of(spatial, main.conv, window)
    count = math.prod((len(x), *size))
    numel = len(x) * x.shape[1] * math.prod(spatial)
    if min(size) < 1 or count < 2 or max(numel, count * len(main.conv.weight)) <= FEW:
        return None

    points: list[Branch] = []
    rest: list[tuple[Branch | None, nn.Module]] = []
    before = [pads[2 * (ndim - 1 - i)] for i in range(ndim)]
    offset: tuple[int, ...] | None = None
    for branch, child in others:
        own = None if branch is None else offset_of(branch, main, before)
        if branch is None or own is None or offset not in (None, own):
            rest.append((branch, child))
        else:
            points.append(branch)
            offset = own
    window = window._replace(offset=offset or window.offset)
    alone = not any(pads) and main.norm is not None and offset_of(main, main, before) == window.offset
    if alone:
        points.insert(0, main)
    points = points if points and pays(points, main.conv, count) else []
    whole = not any(pads) and size == list(x.shape[2:])
    shares = whole and any(hasattr(child, "add_to") for _, child in rest)
    steps, instead = _steps(rest, main), _instead(main, found[0][1], others)
    return Plan(
        *(main, found[0][1], alone, points, window, pads if any(pads) else [], size, count, shares, steps, instead)
    )


def _instead(main: Branch, module: nn.Module, others: Sequence[tuple[Branch | None, nn.Module]]) -> list[Step]:
    """The steps where no branch is a point, the main one first."""
    plain = plain_window(main, main)
    if plain is None:
        return [Step(module, [], None, 0), *_steps(others, main)]
    copies = _copies_of(main, others, main)
    rest = [pair for pair in others if pair not in copies]
    return [Step(None, [main, *(b for b, _ in copies)], plain, 1), *_steps(rest, main)]


def _steps(rest: Sequence[tuple[Branch | None, nn.Module]], main: Branch) -> list[Step]:
    """What adds these branches."""
    steps, dear = [], 0
    while rest:
        (branch, child), *rest = rest
        plain = None if branch is None else plain_window(branch, main)
        if hasattr(child, "add_to") or branch is None or plain is None:
            steps.append(Step(child, [], None, 0))
            continue
        copies = _copies_of(branch, rest, main)
        rest = [pair for pair in rest if pair not in copies]
        is_dear = branch.conv.weight[0].numel() > CHEAP
        if copies:
            keep = (len(copies) + 3) // 3 if is_dear else 0
        else:
            keep = int(is_dear and dear % 3 == 0)
            dear += is_dear
        steps.append(Step(None, [branch, *(b for b, _ in copies)], plain, keep))
    return steps


def _copies_of(
    branch: Branch, others: Sequence[tuple[Branch | None, nn.Module]], main: Branch
) -> list[tuple[Branch, nn.Module]]:
    """Those of the others that run with the branch as one convolution."""
    window = plain_window(branch, main)
    if window is None or window.groups != 1 or branch.conv.weight.shape[1] < FEW_INPUTS:
        return []
    found = []
    for other, child in others:
        if other is None or plain_window(other, main) != window:
            continue
        if are_copies(branch.conv, branch.norm, other.conv, other.norm):
            found.append((other, child))
    return found


def _add_points(
    x: Tensor,
    main: Branch | None,
    points: Sequence[Branch],
    window: Window,
    size: Sequence[int],
    count: int,
    already: tuple[Tensor, Tensor] | None,
) -> Tensor | None:
    """The sum of the main branch and the points; None: rounding would show. `already`: mean and covariance."""
    kernels = [None if b.conv is None else b.conv.weight for b in points]
    with torch.no_grad():
        moments = (
            moments_of(x, window, size) if already is None else Moments(already[0].detach(), already[1].detach(), count)
        )
        found = [statistics(moments, kernel) for kernel in kernels]
        if not all(is_exact(statistic, branch.norm) for branch, statistic in zip(points, found)):
            return None
        for branch, statistic in zip(points, found):
            follow(branch.norm, statistic, count)
    norms = [Norm(b.norm.weight, b.norm.bias, b.norm.eps) for b in points]
    variances = [variance for _, variance, _ in found]
    return add_points(
        x, None if main is None else parts_of(main), list(zip(kernels, norms)), moments, variances, window
    )


def pays(points: Sequence[Branch], conv: Any, count: int) -> bool:
    """Are products over channels about as fast as the maps that they save, in multiplications?"""
    out, inputs, groups = conv.weight.shape[0] // conv.groups, conv.weight.shape[1], conv.groups
    kernels = sum(branch.conv is not None for branch in points)
    maps = count * out * (3 * inputs * kernels + MAP * len(points))
    products = count * (2 * inputs**2 + 3 * inputs * out + PASS * (inputs + out)) + 3 * kernels * out * inputs**2
    return groups * products <= SLOWER * groups * maps


def _is_faster_laid_out(block: nn.Module, x: Any) -> bool:
    """Are they depthwise convolutions, which torch runs several times as fast channels last, more so backward?"""
    main: Any = next(iter(block._modules.values()), None)
    conv = main[0] if type(main) is nn.Sequential and len(main) else main
    if type(conv) is not nn.Conv2d or conv.groups == 1 or conv.in_channels != conv.groups:
        return False
    return type(x) is Tensor and x.dim() == 4 and x.is_contiguous() and not _is_small(block, x) and can_see(block, x)


def _is_small(block: nn.Module, x: Any) -> bool:
    """Are there so few elements, before and behind, that looking at the branches would already take too long?"""
    main: Any = next(iter(block._modules.values()), None)
    conv = main[0] if type(main) is nn.Sequential and len(main) else main
    out = getattr(conv, "out_channels", 0)
    return type(x) is Tensor and x.dim() > 2 and x.numel() // max(x.shape[1], 1) * max(x.shape[1], out) <= FEW


def can_see(block: nn.Module, x: Any) -> bool:
    """Do torch's own operations run on an ordinary tensor, and nobody looks on?"""
    altered = any(is_altered(module) or "parametrizations" in module._modules for module in block.modules())
    return _is_ordinary(x) and not is_recorded() and not altered


def _is_ordinary(x: Any) -> bool:
    """Is it a tensor for torch's own operations on a CPU, in its own type?"""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not all_are_watched()
        and x.numel() > 0
    )
