"""`expand` and `fold` for trees of Gluon blocks.

A DO-Conv is a Gluon convolution with two more parameters, so a layer of the copied tree changes its class and keeps
everything else: its name, its parameters, its hooks, and every reference that its parents hold to it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
from mxnet import gluon

from ..errors import FoldMismatchError, NoMatchError, UnsupportedError, nearest
from . import _algebra
from .layers import DOConv2D


def expand(block: Any, method: str = "doconv", *, depth_multiplier: int | None = None) -> Any:
    """A copy of the block that computes the same, with its convolutions as `DOConv2D`.

    Only ``gluon.nn.Conv2D`` in layout NCHW with more than one tap is replaced, no subclass of it. Shapes may still wait
    for the first input. Layers that share their weight share their D.

    Args:
        block: any Block, also a single convolution.
        method: ``"doconv"``.
        depth_multiplier: as in `DOConv2D`; by default the taps of each kernel.

    Raises:
        NoMatchError: when there is nothing to replace.
        UnsupportedError: for another method, or a `depth_multiplier` below the taps of a kernel.
        In every case `block` is as it was.

    Example:
        >>> net = gluon.nn.HybridSequential()
        >>> net.add(gluon.nn.Conv2D(4, 3, in_channels=2), gluon.nn.Conv2D(4, 1))
        >>> [type(layer).__name__ for layer in expand(net, "doconv")]
        ['DOConv2D', 'Conv2D']
    """
    if method != "doconv":
        raise UnsupportedError(f"method: expected 'doconv', received {method!r}{nearest(str(method), ['doconv'])}")
    work = _copy_of(block)
    layers = [layer for layer in _walk(work) if _replaceable(layer)]
    if not layers:
        raise NoMatchError(
            f"{type(block).__name__} {block.name!r}: expected a gluon.nn.Conv2D in layout NCHW with more than one tap, "
            "found none; subclasses are left alone"
        )
    first: dict[int, Any] = {}
    for layer in layers:
        layer.__class__ = DOConv2D
        shared = first.setdefault(id(layer.weight), layer)
        if shared is not layer:
            layer.depth_multiplier, layer.D = shared.depth_multiplier, shared.D
            if shared.weight_extra is not None:
                layer.weight_extra = shared.weight_extra
            continue
        layer._over_parameterize(depth_multiplier)
        _initialize_like(layer.weight, layer.D, layer.weight_extra)
    return work


def fold(block: Any) -> Any:
    """A copy of the block with every `DOConv2D` as the plain convolution that computes the same.

    Kernels are composed in float64 and cast last. Layers whose shapes still wait for the first input become plain ones
    that wait.

    Args:
        block: any Block, also a single `DOConv2D`; one without them comes back as a copy.

    Raises:
        FoldMismatchError: naming the layer, when a kernel holds NaN or infinity.
        UnsupportedError: for a subclass of `DOConv2D`, and for a weight that two layers use with different D.
        In every case `block` is as it was.

    Example:
        >>> net = gluon.nn.HybridSequential()
        >>> net.add(DOConv2D(4, 3, in_channels=2))
        >>> net.initialize()
        >>> fold(net)[0]
        Conv2D(2 -> 4, kernel_size=(3, 3), stride=(1, 1))
    """
    work = _copy_of(block)
    layers = [layer for layer in _walk(work) if isinstance(layer, DOConv2D)]
    users: dict[int, Any] = {}
    for layer in _walk(work):
        for parameter in layer._reg_params.values():
            D = getattr(layer, "D", None) if isinstance(layer, DOConv2D) else None
            users.setdefault(id(parameter), set()).add(id(D))
    composed = set()
    for layer in layers:
        if type(layer) is not DOConv2D:
            raise UnsupportedError(f"{layer.name}: expected a DOConv2D, found its subclass {type(layer).__name__}")
        if len(users[id(layer.weight)]) > 1:
            raise UnsupportedError(
                f"{layer.name}: its weight is also used without this layer's D, so no one kernel fits; untie it first"
            )
        if layer.D is not None and layer.D._data is not None and id(layer.weight) not in composed:
            layer.weight.set_data(_kernel(layer))
            composed.add(id(layer.weight))
    for layer in layers:
        for part in ("D", "weight_extra"):
            parameter = layer._reg_params.pop(part, None)
            if parameter is not None:
                delattr(layer, part)
                layer.params._params.pop(parameter.name, None)
        del layer.depth_multiplier
        layer.__class__ = gluon.nn.Conv2D
    return work


def _kernel(layer: DOConv2D) -> np.ndarray:
    """The composed kernel in the weight's dtype."""
    parameters: list[Any] = [layer.weight, layer.D, layer.weight_extra]
    weight, D, extra = (None if p is None else p.data(p.list_ctx()[0]).asnumpy() for p in parameters)
    assert weight is not None, "whoever asks has seen that it has values"
    assert D is not None, "whoever asks has seen that it has values"
    with np.errstate(over="ignore"):
        kernel = _algebra.doconv_in_float64(weight, D, extra, layer._kwargs["num_group"]).astype(weight.dtype)
    bad = int((~np.isfinite(kernel)).sum())
    if bad:
        raise FoldMismatchError(
            f"{layer.name}: expected a finite kernel, found {bad} of {kernel.size} not finite in {kernel.dtype}; "
            "the layer's parameters hold NaN or infinity, or need float32"
        )
    return kernel


def _replaceable(layer: Any) -> bool:
    if type(layer) is not gluon.nn.Conv2D or layer._op_name != "Convolution":
        return False
    return layer._kwargs["layout"] == "NCHW" and np.prod(layer._kwargs["kernel"]) > 1


def _initialize_like(weight: Any, *parameters: Any) -> None:
    """Give new parameters values, or let them wait, as `weight` does; leave them alone where it has neither."""
    try:
        contexts = weight.list_ctx()
    except RuntimeError:  # `initialize` was not called yet
        return
    for parameter in parameters:
        if parameter is not None:
            parameter.initialize(ctx=contexts)


def _walk(block: Any) -> Iterator[Any]:
    """The block and all below it, each once."""
    seen: set[int] = set()
    stack = [block]
    while stack:
        current = stack.pop()
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            stack.extend(reversed(list(current._children.values())))


def _copy_of(block: Any) -> Any:
    """A deep copy that trains: compiled graphs, trainers and the name scopes of parents stay behind."""
    memo: dict[int, Any] = {}
    inside = {id(part._scope) for part in _walk(block)}
    for part in _walk(block):
        left = [getattr(part, "_cached_op", None), part._scope._name_scope]
        if id(part._scope._old_scope) not in inside:
            left.append(part._scope._old_scope)
        left += [parameter._trainer for parameter in (*part._reg_params.values(), *part.params.values())]
        memo.update({id(thing): None for thing in left if thing is not None})
    work = copy.deepcopy(block, memo)
    for part in _walk(work):
        if isinstance(part, gluon.HybridBlock):
            part._clear_cached_op()
        for parameter in part._reg_params.values():
            request = parameter.grad_req
            if request != "null" and parameter._data is not None:
                # Copied arrays do not know their gradients: asking anew attaches them.
                parameter.grad_req = "null"
                parameter.grad_req = request
    return work
