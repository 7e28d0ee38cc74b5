"""`absorb_permutations`: the reordering of channels around a grouped convolution moves into the layers beside it.

    P·f(x) = f(P·x)            for whatever treats channels alike: activations, pooling, dropout
    P·(s ⊙ x) = (P·s) ⊙ (P·x)   norms, depthwise convolutions: their own values are reordered
    P·(W·x) = (P·W)·x           an ordinary convolution before: its rows are reordered
    W·(P·x) = (W·P)·x           an ordinary convolution behind: its columns are

so a permutation travels along a chain until an ordinary convolution takes it up for good. It may travel only where
tracing proves that nobody else sees the tensors of the chain, whose channels change places.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._arguments import expect_flags
from ..algebra import Scale
from ..algebra.convolutions import CONVOLUTIONS
from ..algebra.norms import after_norm, is_norm
from ..layers.foldable import conv_arguments, is_altered, plain_class
from ..layers.permuted import PERMUTED
from ._subclasses import is_plain
from ._tracing import Trace
from .dataflow import DataFlow
from .tree import carry_over, copy_of, expect_module, replace_modules

_POOLS = ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "Dropout")
_ALIKE = (
    *(nn.Identity, nn.Dropout, nn.Upsample, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.LogSigmoid, nn.Tanh),
    *(nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
    *(getattr(nn, f"{name}{n}d") for name in _POOLS for n in (1, 2, 3)),
)
"""Modules that treat every channel alike."""
_FUNCTIONS = (
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh),
    *(F.sigmoid, F.tanh, F.softplus, F.dropout, torch.relu, torch.relu_, torch.sigmoid, torch.tanh),
)
_METHODS = ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "contiguous", "clone")
_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


def absorb_permutations(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model with the channel permutations of its `PermutedConv2d` layers moved into the layers around them.

    Call it on what `fold` returns. Where a permutation cannot be moved (another consumer, a residual sum, an end of
    the network, hooks, tied weights, code that cannot be traced) it stays, and the model is as exact as before.
    Convolutions that are rid of both their permutations become plain ones.

    Intermediate feature maps get another order of channels, so compare layers (`verify`) before, not after.

    Args:
        model: a folded model; one without permutations comes back unchanged.
        inplace: change `model` itself; by default a copy is changed.

    Returns:
        The model.

    Raises:
        UnsupportedError: when the model cannot be copied.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> rich = foldconv.expand(net, "dgconv", include="2")
        >>> _ = rich[2].gates.data.copy_(torch.tensor([1.0, -1.0]))
        >>> folded = foldconv.fold(rich)
        >>> folded[2]
        PermutedConv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), groups=2, input_order=..., output_order=...)
        >>> plain = absorb_permutations(folded)
        >>> plain[2]
        Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), groups=2)
        >>> x = torch.randn(1, 3, 8, 8)
        >>> torch.allclose(plain(x), rich(x), atol=1e-6)
        True
    """
    expect_module(model)
    expect_flags(inplace=inplace)
    if not any(_is_permuted(module) for module in model.modules()):
        return model
    work = model if inplace else copy_of(model)
    flow = DataFlow(work)
    # Outputs first: a permutation between two such convolutions joins the second one's input.
    for backward in (False, True):
        chains: dict[nn.Module, list[_Chain]] = {}
        for trace in flow.traces:
            for node, conv in trace.calls():
                if _is_permuted(conv) and conv in flow.free:
                    chains.setdefault(conv, []).append(_follow(trace, node, flow.free, backward))
        called = Counter(module for trace in flow.traces for module in {module for _, module in trace.calls()})
        for conv, (chain, *others) in chains.items():
            # Each trace is of another way through the model; what moves must be right for all.
            alike = all(other == chain for other in others) and all(
                module is None or called[module] == called[conv] for module in (*chain.passed, chain.end)
            )
            if chain.end is not None and alike:
                _move(conv, chain, backward)
    freed = [m for m in work.modules() if _is_permuted(m) and m.input_order is None and m.output_order is None]
    return replace_modules(work, {module: _as_plain(module) for module in freed})


@dataclasses.dataclass
class _Chain:
    """The layers with values per channel that a permutation passes, and the convolution that takes it up, if any."""

    passed: list[nn.Module] = dataclasses.field(default_factory=list)
    end: nn.Module | None = None


def _follow(trace: Trace, node: fx.Node, free: set[nn.Module], backward: bool) -> _Chain:
    """Where the permutation on one side of a convolution can go, as one trace shows it."""
    called = dict(trace.calls())
    chain = _Chain()
    while True:
        step = _link(trace, node) if not backward else next(iter(node.args), None)
        if not isinstance(step, fx.Node) or (backward and _link(trace, step) is not node):
            return chain
        node = step
        module: Any = called.get(node)
        if module is None:
            if node.target not in (_FUNCTIONS if node.op == "call_function" else _METHODS):
                return chain
        elif _has_values_per_channel(module) and module in free:
            chain.passed.append(module)
        elif type(module) not in _ALIKE or is_altered(module):
            takes = (is_plain(module) and module.groups == 1) or (_is_permuted(module) and not backward)
            chain.end = module if takes and module in free else None
            return chain


def _link(trace: Trace, node: fx.Node) -> fx.Node | None:
    """The only reader of a value."""
    return next(iter(node.users)) if len(node.users) == 1 and node not in trace.escaped else None


def _has_values_per_channel(module: Any) -> bool:
    """Does the module treat each channel by itself, with numbers of its own?"""
    if is_norm(module):
        return all(type(rest) in _ALIKE for rest in after_norm(module).modules() if type(rest) is not nn.Sequential)
    if type(module) in CONVOLUTIONS.values():
        return module.groups == module.in_channels == module.out_channels > 1
    return type(module) in (Scale, nn.PReLU)


def _move(conv: Any, chain: _Chain, backward: bool) -> None:
    """Take the permutation from the convolution and give it to the end of the chain."""
    order: Tensor | None = conv.input_order if backward else conv.output_order
    end: Any = chain.end
    if order is None:
        return
    # What was channel order[c] of the tensors on the chain becomes channel c when going back, the reverse going on.
    index = order if backward else order.argsort()
    for module in chain.passed:
        for name in _PER_CHANNEL:
            _reorder(getattr(module, name, None), 0, index)
    if _is_permuted(end):
        end.input_order = order if end.input_order is None else order[end.input_order]
    else:
        outputs = 1 if end.transposed else 0
        _reorder(end.weight, outputs if backward else 1 - outputs, index)
        if backward:
            _reorder(end.bias, 0, index)
    setattr(conv, "input_order" if backward else "output_order", None)


@torch.no_grad()
def _reorder(values: Tensor | None, dim: int, index: Tensor) -> None:
    # One number for all channels (a PReLU's) has no order.
    if values is not None and values.shape[dim] > 1:
        values.copy_(values.index_select(dim, index))


def _is_permuted(module: nn.Module) -> TypeGuard[Any]:
    return type(module) in PERMUTED.values()


def _as_plain(module: Any) -> nn.Module:
    cls: Any = plain_class(module)
    plain = cls(**conv_arguments(module), device="meta")
    plain.weight, plain.bias = module.weight, module.bias
    return carry_over(module, plain)
