"""`expand` and `fold` for trees of Gluon blocks.

A DO-Conv is a Gluon convolution with two more parameters, so a layer of the copied tree changes its class and keeps
everything else: its name, its parameters, its hooks, and every reference that its parents hold to it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon.nn import conv_layers

from .. import formulas
from .._selection import Patterns, Selection, choose
from ..errors import FoldMismatchError, UnsupportedError, unknown
from . import _layout
from .layers import DOConv2D


def expand(
    block: Any,
    method: str = "doconv",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    depth_multiplier: int | None = None,
) -> Any:
    """A copy of the block that computes the same, with its convolutions as `DOConv2D`.

    Only ``gluon.nn.Conv2D`` with more than one tap is replaced, no subclass of it. Shapes may still wait for the first
    input. Layers that share their weight share their D. D starts with the weight's ``grad_req``, ``lr_mult`` and
    ``wd_mult``: it decays where the weight does, which pulls it towards the identity.

    Args:
        block: any Block, also a single convolution.
        method: ``"doconv"``.
        include, exclude: glob patterns on the layers' names in the file of `save_parameters` (``"features.*"``), one or
            several; not on ``layer.name``, which counts all layers that the process has made.
        depth_multiplier: as in `DOConv2D`; by default the taps of each kernel.

    Raises:
        NoMatchError: when there is nothing to replace, or a pattern matches no convolution.
        UnsupportedError: for another method, a `depth_multiplier` below the taps of a kernel, a convolution named in
            `include` that cannot be replaced exactly, and a weight shared with a layer that stays or that pairs its
            channels otherwise.
        In every case `block` is as it was.

    Example:
        >>> net = gluon.nn.HybridSequential()
        >>> net.add(gluon.nn.Conv2D(4, 3, in_channels=2), gluon.nn.Conv2D(4, 1))
        >>> [type(layer).__name__ for layer in expand(net, "doconv")]
        ['DOConv2D', 'Conv2D']
    """
    if method != "doconv":
        raise UnsupportedError(unknown("method", method, ["doconv"]))
    chosen = _choose(block, Selection(include, exclude))
    _check_ties(block, chosen)
    work = _copy_of(block)
    first: dict[int, Any] = {}
    names = set(chosen.values())
    for layer in (layer for name, layer in _named(work) if name in names):
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
    if layer._channels_last:
        weight = weight.transpose(0, 3, 1, 2)
    with np.errstate(over="ignore"):
        kernel = _layout.doconv_in_float64(weight, D, extra, layer._kwargs["num_group"]).astype(weight.dtype)
    if layer._channels_last:
        kernel = kernel.transpose(0, 2, 3, 1)
    bad = int((~np.isfinite(kernel)).sum())
    if bad:
        raise FoldMismatchError(
            f"{layer.name}: expected a finite kernel, found {bad} of {kernel.size} not finite in {kernel.dtype}; "
            "the layer's parameters hold NaN or infinity, or need float32"
        )
    return kernel


def _choose(block: Any, selection: Selection) -> dict[Any, str]:
    """The convolutions to replace, with their first names."""
    names: dict[Any, list[str]] = {}
    for name, layer in _named(block):
        if isinstance(layer, conv_layers._Conv):
            names.setdefault(layer, []).append(name)
    words = {"method": "doconv", "model": type(block).__name__, "kinds": "gluon.nn.Conv2D"}
    return choose(names, selection, _reason_against, **words, foldable=DOConv2D, where=None)


def _reason_against(layer: Any) -> str | None:
    """Why this convolution may not be replaced."""
    if isinstance(layer, DOConv2D):
        return "it is a DO-Conv already"
    if type(layer) is not gluon.nn.Conv2D:
        if type(layer).__module__ == conv_layers.__name__:
            return "only gluon.nn.Conv2D has a DO-Conv here"
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        return f"{kind} is a subclass, so it may compute another function"
    if vars(layer).keys() & {"forward", "hybrid_forward"}:
        return "its forward was replaced on the instance, so it may compute another function"
    if math.prod(layer._kwargs["kernel"]) == 1:
        return formulas.DOCONV_OF_ONE_TAP
    more = sorted(layer._reg_params.keys() - {"weight", "bias"})
    return f"it also holds {', '.join(map(repr, more))}, which a folded convolution has no place for" if more else None


def _check_ties(block: Any, chosen: dict[Any, str]) -> None:
    """Refuse what D would untie: a weight's users are all replaced, and read its channels in the same way."""
    replaced: dict[int, tuple[str, Any]] = {}
    for layer, name in chosen.items():
        other, twin = replaced.setdefault(id(layer.weight), (name, layer))
        if any(layer._kwargs[key] != twin._kwargs[key] for key in ("num_group", "layout")):
            raise UnsupportedError(
                f"{name} shares its weight with {other}, but not its groups and layout, so that no one D fits both; "
                "exclude both"
            )
    for name, part in _named(block):
        for parameter in part._reg_params.values():
            if id(parameter) in replaced and part not in chosen:
                raise UnsupportedError(
                    f"{replaced[id(parameter)][0]} shares its weight with {name or 'the root'}, which would stay as it "
                    "is; folding would untie them: include both or exclude both"
                )


def _initialize_like(weight: Any, *parameters: Any) -> None:
    """Give new parameters values, or let them wait, as `weight` does; leave them alone where it has neither."""
    for parameter in parameters:
        if parameter is not None:
            parameter.grad_req, parameter.lr_mult, parameter.wd_mult = weight.grad_req, weight.lr_mult, weight.wd_mult
    try:
        contexts = weight.list_ctx()
    except RuntimeError:  # `initialize` was not called yet
        return
    for parameter in parameters:
        if parameter is not None:
            parameter.initialize(ctx=contexts)


def _named(block: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The block and all below it, under every one of their names."""
    yield prefix, block
    for name, child in block._children.items():
        yield from _named(child, f"{prefix}.{name}" if prefix else name)


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
        parameters = (*part._reg_params.values(), *part.params.values())
        left += [parameter._trainer for parameter in parameters]
        memo.update({id(thing): None for thing in left if thing is not None})
        with autograd.pause():
            # A deep copy of an array on cpu(1) would be on cpu(0).
            for array in {id(array): array for p in parameters for array in p._data or ()}.values():
                memo.setdefault(id(array), array.copy())
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
