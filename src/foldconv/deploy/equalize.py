"""`equalize`: ranges of channels become alike, the function stays; for what is quantized with one scale per tensor.

An activation f with f(s·x) = s·f(x) for s > 0 lets a channel be made smaller before it and larger behind it:

    W⁽²⁾ f(W⁽¹⁾ x + b) = (W⁽²⁾ S) f(S⁻¹ W⁽¹⁾ x + S⁻¹ b),    sᵢ = √(r⁽¹⁾ᵢ / r⁽²⁾ᵢ)

with r⁽¹⁾ᵢ the largest weight of output channel i before and r⁽²⁾ᵢ that of input channel i behind: then both are
√(r⁽¹⁾ᵢ r⁽²⁾ᵢ). M. Nagel, M. van Baalen, T. Blankevoort, M. Welling: Data-free quantization through weight equalization
and bias correction, ICCV 2019, equations 7 to 11. Their absorption of biases is left out: at padded borders it changes
the function.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..algebra.convolutions import PLAIN
from ..errors import FoldMismatchError, UnsupportedError, install
from ..layers import Foldable
from ..layers.foldable import is_altered
from ..layers.permuted import PERMUTED
from ..network._outputs import difference
from ..network._subclasses import is_convolution
from ..network._tracing import Trace
from ..network._watching import arguments_of
from ..network.dataflow import DataFlow
from ..network.table import some
from ..network.tree import copy_of, expect_module

_LOG = logging.getLogger(__name__)
TOLERANCE = 1e-10
"""Largest difference in float64, relative to the output's largest value."""
_ROUNDS = 50
_POOLS = ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "Dropout")
_HOMOGENEOUS = (
    *(nn.Identity, nn.Dropout, nn.ReLU, nn.LeakyReLU, nn.PReLU),
    *(getattr(nn, f"{name}{n}d") for name in _POOLS for n in (1, 2, 3)),
)
"""Modules with f(s·x) = s·f(x) for each channel and s > 0."""
_FUNCTIONS = (F.relu, F.leaky_relu, F.dropout, torch.relu, torch.relu_)
_METHODS = ("relu", "relu_", "contiguous", "clone")
_CLIPPED = (nn.ReLU6, nn.Hardtanh, nn.Hardswish, F.relu6, F.hardtanh)


def equalize(model: nn.Module, example_inputs: Any = None, *, inplace: bool = False) -> nn.Module:
    """The model with channels of like ranges, in the weights and, through them, in the activations.

    Call it on what ``fold(model, batchnorm=True)`` returns, before quantizing. Brevitas' `EqualizeGraph` does what it
    does exactly (residual sums, concatenations, gates); grouped convolutions and PReLU, which it leaves, are done here.
    Layers before a ReLU6, a Hardswish or another function that is not homogeneous stay, and are logged.

    Args:
        model: folded, in floating point.
        example_inputs: what the model is called with; brevitas runs only if they are given, since nobody else could
            tell whether it was right.
        inplace: change `model` itself; by default a copy is changed.

    Raises:
        UnsupportedError: foldable layers are left, or a convolution is called twice in one forward.
        FoldMismatchError: the outputs in float64 differ by more than 1e-10 of the largest; `model` is as it was.
        ModuleNotFoundError: with `example_inputs`, where brevitas is missing; the extra ``quantization`` brings it.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.PReLU(), nn.Conv2d(2, 4, 3))
        >>> _ = net[0].weight.data[0].mul_(100)
        >>> even = equalize(net)
        >>> ranges = even[0].weight.abs().amax((1, 2, 3))
        >>> bool(ranges.max() / ranges.min() < 25)  # more than 60 before
        True
    """
    expect_module(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, Foldable)]
    if layers:
        raise UnsupportedError(f"{layers[0]}: a foldable layer; fold the network first, with batchnorm=True")
    work = copy_of(model)
    _refuse_reused(work)
    before = copy_of(work).double().eval()
    exact = copy_of(before)
    if example_inputs is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own parts that go
            _by_brevitas(exact)
        if not _agree(before, exact, example_inputs)[0]:  # it scales both factors of x * x, for one
            _LOG.warning("brevitas changed what the network computes; what it did is undone")
            exact = copy_of(before)
    clipped = _by_pairs(exact)
    if example_inputs is not None:
        agree, error, allowed = _agree(before, exact, example_inputs)
        if not agree:
            raise FoldMismatchError(
                f"the equalized network differs: expected at most {allowed:.1e}, received {error:.1e}; nothing was "
                "changed; report this network"
            )
    if clipped:
        _LOG.warning(
            "%d layers keep their ranges: %s; what follows them is clipped or curved (ReLU6, Hardswish)",
            *(len(clipped), some(clipped)),
        )
    target = model if inplace else work
    with torch.no_grad():
        for name, values in exact.named_parameters():
            target.get_parameter(name).copy_(values)
    return target


def _refuse_reused(model: nn.Module) -> None:
    """A convolution that is called twice has one range and two places behind it; nobody scales that rightly."""
    names = {module: name for name, module in model.named_modules()}
    flow = DataFlow(model)
    for module, count in flow.calls.items():
        if count > 1 and isinstance(module, (*PLAIN, nn.Linear)):
            raise UnsupportedError(
                f"{names[module]}: is called {count} times in one forward, which equalization cannot follow; give each "
                "call a module of its own"
            )


def _by_brevitas(model: nn.Module) -> None:
    """Its equalization of the model itself, where brevitas can trace it."""
    try:
        from brevitas.fx import symbolic_trace  # pyright: ignore[reportMissingImports]
        from brevitas.graph.equalize import EqualizeGraph  # pyright: ignore[reportMissingImports]
        from brevitas.graph.standardize import TorchFunctionalToModule  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"equalize needs brevitas; install it: {install('quantization')}", name=error.name
        ) from None
    try:
        functions = (*TorchFunctionalToModule.FN_TO_MODULE_MAP, (torch.relu, nn.ReLU), (torch.relu_, nn.ReLU))
        graph = TorchFunctionalToModule(functions).apply(symbolic_trace(model))
    except Exception as error:  # a tracer raises whatever the forward does to a stand-in
        _LOG.warning("brevitas cannot trace the network (%s): residual sums and gates stay", type(error).__name__)
        return
    EqualizeGraph(iterations=20, merge_bias=False).apply(graph)
    with torch.no_grad():
        for name, values in graph.named_parameters():
            if name in dict(model.named_parameters()):
                model.get_parameter(name).copy_(values)


def _by_pairs(model: nn.Module) -> list[str]:
    """Equalize each pair of layers with homogeneous functions between; names of layers that others follow."""
    flow = DataFlow(model)
    names = {module: name for name, module in model.named_modules()}
    pairs: dict[Any, set[Any]] = {}
    clipped: dict[nn.Module, None] = {}
    for trace in flow.traces:
        called = dict(trace.calls())
        for node, first in called.items():
            if _scales(first) and first in flow.free:
                second, curved = _next(trace, node, called)
                pairs.setdefault(first, set()).add(second if second in flow.free else None)
                if curved:
                    clipped[first] = None
    alike = [(first, *seconds) for first, seconds in pairs.items() if len(seconds) == 1 and None not in seconds]
    for _ in range(_ROUNDS):
        if max((_even(first, second) for first, second in alike), default=0.0) < 1e-3:
            break
    return [names[module] for module in clipped]


def _next(trace: Trace, node: fx.Node, called: dict[fx.Node, nn.Module]) -> tuple[nn.Module | None, bool]:
    """The layer that alone gets a layer's output, through homogeneous functions only; or whether one is clipped."""
    while len(node.users) == 1 and node not in trace.escaped:
        (user,) = node.users
        module: Any = called.get(user)
        if not user.args or user.args[0] is not node:
            return None, False
        if isinstance(module, (*PLAIN, nn.Linear)):
            return (module if _scales(module) and not is_altered(module) else None), False
        kind = user.target if module is None else type(module)
        if kind in _CLIPPED:
            return None, True
        homogeneous = kind in (*_HOMOGENEOUS, *_FUNCTIONS, *_METHODS)
        if not homogeneous or (module is not None and is_altered(module)):
            return None, False
        node = user
    return None, False


def _scales(layer: nn.Module) -> bool:
    """Is the layer linear in its weight as it stands? Subclasses may standardize it, or add to what it gives."""
    return type(layer) in (nn.Linear, *PERMUTED.values()) or is_convolution(layer)


@torch.no_grad()
def _even(first: Any, second: Any) -> float:
    """One step of equation 11; how far the largest scale was from 1, as a logarithm."""
    before, behind = by_output(first), _by_input(second)
    scale = (before.abs().amax(1) / behind.abs().amax(1)).sqrt()
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)  # a channel that is zero, or that nobody reads
    by_output(first, 1 / scale)
    _by_input(second, scale)
    return float(scale.log().abs().max())


def by_output(layer: Any, factor: Tensor | None = None) -> Tensor:
    """The weights by channel of the output, ``(out, rest)``; with a factor of each, by which they and the bias grow."""
    weight, order = _by_groups(layer), getattr(layer, "output_order", None)
    if factor is not None:
        # A permuted layer's output n is its convolution's output order[n].
        own = factor if order is None else factor[order.argsort()]
        weight.mul_(own.view(*weight.shape[:2], *(1,) * (weight.dim() - 2)))
        if layer.bias is not None:
            layer.bias.mul_(own)
    rows = weight.flatten(2).flatten(0, 1)
    return rows if order is None else rows[order]


def _by_input(layer: Any, factor: Tensor | None = None) -> Tensor:
    """The same by channel of the input, ``(in, rest)``, without a bias."""
    weight, order = _by_groups(layer).transpose(1, 2), getattr(layer, "input_order", None)
    if factor is not None:
        # A permuted layer's convolution has as its input n the layer's input order[n].
        own = factor if order is None else factor[order]
        weight.mul_(own.view(*weight.shape[:2], *(1,) * (weight.dim() - 2)))
    rows = weight.flatten(2).flatten(0, 1)
    return rows if order is None else rows[order.argsort()]


def _by_groups(layer: Any) -> Tensor:
    """The weight itself, however it lies in memory, as ``(groups, out of one, in of one, *taps)``."""
    weight = layer.weight.unflatten(0, (getattr(layer, "groups", 1), -1))
    return weight.transpose(1, 2) if getattr(layer, "transposed", False) else weight


def _agree(before: nn.Module, after: nn.Module, example_inputs: Any) -> tuple[bool, float, float]:
    """Do two networks in float64 compute the same; the largest difference, and the largest that would do."""
    args, kwargs = arguments_of(example_inputs)

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}
    with torch.no_grad():
        error, scale = difference(before(*args, **kwargs), after(*args, **kwargs), "the output")
    return error <= TOLERANCE * scale, error, TOLERANCE * scale
