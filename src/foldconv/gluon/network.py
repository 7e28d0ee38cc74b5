"""`expand` and `fold` for trees of Gluon blocks.

A DO-Conv is a Gluon convolution with two more parameters, so a layer of the copied tree changes its class and keeps
everything else: its name, its parameters, its hooks, and every reference that its parents hold to it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
from typing import Any

from mxnet import gluon
from mxnet.gluon.nn import conv_layers

from .. import formulas
from .._arguments import expect
from .._selection import Patterns, Selection, choose
from ..errors import UnsupportedError, unknown
from ._tree import copy_of, named
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
        TypeError: for what is no Block.
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
    expect("block", block, gluon.Block, "a Block of Gluon")
    chosen = _choose(block, Selection(include, exclude))
    _check_ties(block, chosen)
    work = copy_of(block)
    first: dict[int, Any] = {}
    names = set(chosen.values())
    for layer in (layer for name, layer in named(work) if name in names):
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


def _choose(block: Any, selection: Selection) -> dict[Any, str]:
    """The convolutions to replace, with their first names."""
    names: dict[Any, list[str]] = {}
    for name, layer in named(block):
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
    for name, part in named(block):
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
