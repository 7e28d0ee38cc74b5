"""`expand` and `fold` for whole Keras models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import keras

from .._selection import Patterns, Selection, choose
from ..errors import UnsupportedError
from ._copying import Copier
from ._graph import is_graph, links, takes_in
from ._registry import Method, method_of, plain_class
from ._subclassed import mark
from .foldable import FoldableLayer
from .repvgg import NormPlace, RepVGGLayer

_KINDS = ("Conv", "DepthwiseConv", "SeparableConv")
_NAMES = [f"{kind}{n}D{more}" for kind in _KINDS for n in (1, 2, 3) for more in ("", "Transpose")]
_CONVOLUTIONS: Any = tuple(getattr(keras.layers, name) for name in _NAMES if hasattr(keras.layers, name))


def expand(
    model: Any, method: str | Method = "doconv", *, include: Patterns = None, exclude: Patterns = None, **options: Any
) -> Any:
    """A new model whose convolutions train by a method and which computes the same function.

    Sequential, functional and subclassed models, nested in each other to any depth, wrappers such as
    ``TimeDistributed``, and layers that hold layers in attributes, lists and dicts. What stays as it is: convolutions
    to which the method adds nothing, transposed and separable ones, and subclasses of Keras' convolutions that have
    more of their own than a constructor and ``get_config`` (those that have not fold to Keras' own class).

    The copy of a subclassed model is of a subclass of its class, and trains and saves as that does. It is made again
    from its config, as Keras loads a model; variables, and attributes of data, are then set to what they are now.

    Args:
        model: built; it is not touched. The copy is not compiled unless a Sequential model was.
        method: ``"doconv"``, ``"orepa"`` or ``"repvgg"``, or a method's config. RepVGG takes in the BatchNormalization
            that alone follows a convolution in a Sequential or functional model, and leaves a
            `foldconv.keras.NormPlace` of its name.
        include, exclude: glob patterns on layer names.
        options: the method's: ``depth_multiplier`` of DO-Conv (S of every layer; None: its taps), ``point`` of OREPA
            (the 1×1 branch).

    Raises:
        NoMatchError: when nothing was replaced, or a pattern matches no convolution.
        UnsupportedError: for an unknown method or option, a convolution that `include` spells out and that cannot be
            replaced, a model that is not built, or a subclassed one that cannot be made again from its config as it is
            now, or that holds a layer to be replaced elsewhere than in attributes, lists and dicts (in a closure).

    Example:
        >>> net = keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Conv2D(8, 3)])
        >>> rich = expand(net, "doconv")
        >>> type(rich.layers[0]).__name__, type(fold(rich).layers[0]).__name__
        ('DOConv2D', 'Conv2D')
    """
    config = method_of(method, options)
    check_built(model)
    names: dict[Any, list[str]] = {}
    for layer in _layers(model):
        if isinstance(layer, (*_CONVOLUTIONS, FoldableLayer)):
            names.setdefault(layer, []).append(layer.name)
    followers: dict[Any, Any] = {}
    if config.takes_norm:
        pairs = [pair for graph in _graphs(model) for pair in links(graph)]
        followers = {a: b for a, b in pairs if {type(a), plain_class(a)} & config.layers.keys() and takes_in(a, b)}

    normalized = {id(one.layer) for one in _layers(model) if isinstance(one, keras.layers.SpectralNormalization)}

    def reason_against(layer: Any) -> str | None:
        if id(layer) in normalized:
            return "the SpectralNormalization around it writes to its kernel"
        return _reason_against(layer, config) or config.reason_against(layer, followers.get(layer))

    words = {"method": config.name, "model": model.name, "kinds": "keras.layers.Conv2D and its like"}
    chosen = choose(names, Selection(include, exclude), reason_against, **words, foldable=FoldableLayer)
    norms = {followers[layer] for layer in chosen if layer in followers}

    def replacement(layer: Any) -> Any:
        if layer in norms:
            return _place_of(layer)
        return config.expand(layer, followers.get(layer)) if layer in chosen else None

    return _copy(model, replacement, lambda layer: layer in chosen or layer in norms)


def _reason_against(layer: Any, config: Method) -> str | None:
    """Why a method may not replace this convolution, whatever its arguments."""
    if isinstance(layer, FoldableLayer):
        return "it is foldable already"
    if {type(layer), plain_class(layer)} & config.layers.keys():
        return None
    if plain_class(layer) in _CONVOLUTIONS:
        return f"{config.name} has no layer for it; expected one of {', '.join(c.__name__ for c in config.layers)}"
    name = f"{type(layer).__module__}.{type(layer).__name__}"
    return f"{name} is a subclass with more than a constructor of its own, so it may compute otherwise"


def fold(model: Any) -> Any:
    """A new model with a plain Keras layer for each foldable layer; its weights fit the model before `expand`.

    Args:
        model: any that `expand` takes; it is not touched.

    Raises:
        UnsupportedError: for a model that is not built or cannot be copied, and for a `NormPlace` that does not follow
            its layer.
    """
    check_built(model)
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

    return _copy(model, plain, lambda layer: isinstance(layer, (FoldableLayer, NormPlace)))


def _place_of(norm: Any) -> NormPlace:
    return NormPlace(norm.get_config(), name=norm.name, dtype=norm.dtype_policy)


def _layers(model: Any) -> list[Any]:
    """All layers in a model, at whatever depth; those of a foldable layer's own aside."""
    found, own = [], set()
    for layer in model._flatten_layers(include_self=False):
        if id(layer) not in own:
            found.append(layer)
        if isinstance(layer, FoldableLayer):
            own |= {id(inner) for inner in layer._flatten_layers(include_self=False)}
    return found


def _graphs(model: Any) -> list[Any]:
    """The Sequential and functional models in a model, itself among them."""
    return [layer for layer in [model, *_layers(model)] if is_graph(layer)]


def check_built(model: Any) -> None:
    """Raise an UnsupportedError for what is no model, or one without weights."""
    if not isinstance(model, keras.Model):
        raise UnsupportedError(f"model: expected a keras.Model, received {type(model).__name__}; put layers into one")
    if not model.built:
        raise UnsupportedError(f"{model.name}: it has no weights yet; call it, or build it, first")


def _copy(model: Any, replace: Callable[[Any], Any], changes: Callable[[Any], bool]) -> Any:
    return Copier(replace, changes, mark).copy(model)
