"""`expand` and `fold` for whole Keras models."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import keras

from ..errors import NoMatchError, UnsupportedError, nearest
from ._graph import is_graph, links, takes_in
from ._registry import method_of
from .foldable import FoldableLayer
from .repvgg import NormPlace, RepVGGLayer

Patterns = str | Iterable[str] | None


def expand(
    model: Any, method: str = "doconv", *, include: Patterns = None, exclude: Patterns = None, **options: Any
) -> Any:
    """A new model whose convolutions train by a method and which computes the same function.

    Sequential and functional models, nested in each other to any depth. What stays as it is: convolutions to which the
    method adds nothing, subclasses of Keras' convolutions, transposed and separable ones, and those inside wrappers.

    Args:
        model: built; it is not touched. The copy is not compiled unless a Sequential model was.
        method: ``"doconv"``, ``"orepa"`` or ``"repvgg"``. RepVGG takes in the BatchNormalization that alone follows a
            convolution and leaves a `foldconv.keras.NormPlace` of its name.
        include, exclude: glob patterns on layer names.
        options: the method's: ``depth_multiplier`` of DO-Conv (S of every layer; None: its taps), ``point`` of OREPA
            (the 1×1 branch).

    Raises:
        NoMatchError: when nothing was replaced, or a pattern matches no convolution.
        UnsupportedError: for an unknown method or option, a model that is not built, or a subclassed one (also within
            another).

    Example:
        >>> net = keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Conv2D(8, 3)])
        >>> rich = expand(net, "doconv")
        >>> type(rich.layers[0]).__name__, type(fold(rich).layers[0]).__name__
        ('DOConv2D', 'Conv2D')
    """
    chosen = method_of(method, options)
    included, excluded = _as_list(include), _as_list(exclude)
    known = [layer for layer in _leaves(model) if type(layer) in chosen.layers or isinstance(layer, FoldableLayer)]
    names = [layer.name for layer in known]
    for pattern in (included or []) + (excluded or []):
        if not fnmatch.filter(names, pattern):
            raise NoMatchError(f"the pattern {pattern!r} matches no convolution{nearest(pattern, names)}")
    followers: dict[int, Any] = {}
    if chosen.takes_norm:
        pairs = [pair for graph in _graphs(model) for pair in links(graph)]
        followers = {id(a): b for a, b in pairs if type(a) in chosen.layers and takes_in(a, b)}
    plans: dict[int, Any] = {}
    reasons: dict[str, str] = {}
    for layer in known:
        wanted = included is None or any(fnmatch.fnmatchcase(layer.name, p) for p in included)
        if type(layer) not in chosen.layers or not wanted:
            continue
        if any(fnmatch.fnmatchcase(layer.name, p) for p in excluded or []):
            continue
        norm = followers.get(id(layer))
        reason = chosen.reason_against(layer, norm)
        if reason is not None:
            reasons[layer.name] = reason
            continue
        plans[id(layer)] = lambda layer=layer, norm=norm: chosen.expand(layer, norm)
        if norm is not None:
            plans[id(norm)] = lambda norm=norm: _place_of(norm)
    if not plans:
        why = "".join(f"; {name}: {reason}" for name, reason in list(reasons.items())[:1])
        raise NoMatchError(
            f"nothing to expand in {model.name}: {len(names)} convolutions, none of them replaceable{why}"
        )
    return _copy(model, lambda layer: plans[id(layer)]() if id(layer) in plans else None)


def fold(model: Any) -> Any:
    """A new model with a plain Keras layer for each foldable layer; its weights fit the model before `expand`.

    Args:
        model: Sequential or functional, nested or not; it is not touched.

    Raises:
        UnsupportedError: for a model that is not built or subclassed, a foldable layer inside a wrapper, or a
            `NormPlace` that does not follow its layer.
    """
    places = {
        id(layer): place
        for graph in _graphs(model)
        for layer, place in links(graph)
        if isinstance(layer, RepVGGLayer) and isinstance(place, NormPlace)
    }
    norms: dict[int, Any] = {}

    def plain(layer: Any) -> Any:
        if id(layer) in places:  # comes before its place
            place = places[id(layer)]
            new, norms[id(place)] = layer.fold_before(place.config)
            return new
        if not isinstance(layer, NormPlace):
            return layer.fold() if isinstance(layer, FoldableLayer) else None
        if id(layer) not in norms:
            raise UnsupportedError(
                f"{layer.name}: it keeps a norm's place, but no RepVGG layer is right before it; keep the two together"
            )
        return norms[id(layer)]

    return _copy(model, plain, folding=True)


def _place_of(norm: Any) -> NormPlace:
    return NormPlace(norm.get_config(), name=norm.name, dtype=norm.dtype_policy)


def _graphs(model: Any) -> list[Any]:
    """The Sequential and functional models in a model, itself among them."""
    within = [layer for layer in model._flatten_layers(include_self=False) if is_graph(layer)]
    return [model, *within]


def _copy(model: Any, replace: Any, folding: bool = False) -> Any:
    """A clone with other layers where `replace` gives one, and all other weights copied."""
    _leaves(model)  # raises for what cannot be copied
    kept = []

    def clone(layer: Any) -> Any:
        new = replace(layer)
        if new is None:
            within = layer._flatten_layers() if isinstance(layer, keras.Layer) else []
            if folding and any(isinstance(inner, FoldableLayer) for inner in within):
                raise UnsupportedError(f"{layer.name}: it holds a foldable layer inside; call that one's fold()")
            new = type(layer).from_config(layer.get_config())
            kept.append((layer, new))
            if isinstance(layer, keras.Layer):
                new.trainable = layer.trainable
        return new

    copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    for layer, new in kept:
        if isinstance(layer, keras.Layer) and layer.weights:
            new.set_weights(layer.get_weights())
    return copy


def _leaves(model: Any) -> list[Any]:
    """The layers of a model and of the models within it."""
    if not is_graph(model):
        raise UnsupportedError(
            f"{type(model).__name__}: expected a Sequential or functional model; in a subclassed one, use the "
            "layers of foldconv.keras where it makes its own"
        )
    if not model.built:
        raise UnsupportedError(f"{model.name}: it has no weights yet; call it, or build it, first")
    found = []
    for layer in model.layers:
        found += _leaves(layer) if isinstance(layer, keras.Model) else [layer]
    return found


def _as_list(patterns: Patterns) -> list[str] | None:
    return None if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
