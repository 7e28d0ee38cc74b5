"""`expand` and `fold` for whole Keras models."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import keras

from ..errors import NoMatchError, UnsupportedError, nearest
from ._registry import method_of
from .foldable import FoldableLayer

Patterns = str | Iterable[str] | None


def expand(
    model: Any,
    method: str = "doconv",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    **options: Any,
) -> Any:
    """A new model whose convolutions train as DO-Conv and which computes the same function.

    Sequential and functional models, nested in each other to any depth. What stays as it is: kernels of one tap,
    subclasses of Keras' convolutions, transposed and separable ones, and those inside wrappers.

    Args:
        model: built; it is not touched. The copy is not compiled unless a Sequential model was.
        method: ``"doconv"``, the one there is for Keras.
        include, exclude: glob patterns on layer names.
        depth_multiplier: S of every layer; None: its taps.

    Raises:
        NoMatchError: when nothing was replaced, or a pattern matches no convolution.
        UnsupportedError: for another method, a model that is not built, or a subclassed one (also within another).

    Example:
        >>> net = keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Conv2D(8, 3)])
        >>> rich = expand(net)
        >>> type(rich.layers[0]).__name__, type(fold(rich).layers[0]).__name__
        ('DOConv2D', 'Conv2D')
    """
    chosen_method = method_of(method, options)
    classes = chosen_method.layers
    included, excluded = _as_list(include), _as_list(exclude)
    names = [layer.name for layer in _leaves(model) if type(layer) in classes or isinstance(layer, FoldableLayer)]
    for pattern in (included or []) + (excluded or []):
        if not fnmatch.filter(names, pattern):
            raise NoMatchError(f"the pattern {pattern!r} matches no convolution{nearest(pattern, names)}")
    replaced = []

    def rich(layer: Any) -> Any:
        chosen = type(layer) in classes and chosen_method.reason_against(layer) is None
        chosen = chosen and (included is None or any(fnmatch.fnmatchcase(layer.name, p) for p in included))
        if not chosen or any(fnmatch.fnmatchcase(layer.name, p) for p in excluded or []):
            return None
        replaced.append(chosen_method.expand(layer))
        return replaced[-1]

    copy = _copy(model, rich)
    if not replaced:
        raise NoMatchError(f"nothing to expand in {model.name}: {len(names)} convolutions, none of them replaceable")
    return copy


def fold(model: Any) -> Any:
    """A new model with a plain Keras layer for each DO-Conv layer; its weights fit the model before `expand`.

    Args:
        model: Sequential or functional, nested or not; it is not touched.

    Raises:
        UnsupportedError: for a model that is not built or subclassed, or a DO-Conv layer inside a wrapper.
    """
    return _copy(model, lambda layer: layer.fold() if isinstance(layer, FoldableLayer) else None, folding=True)


def _copy(model: Any, replace: Any, folding: bool = False) -> Any:
    """A clone with other layers where `replace` gives one, and all other weights copied."""
    _leaves(model)  # raises for what cannot be copied
    kept = []

    def clone(layer: Any) -> Any:
        new = replace(layer)
        if new is None:
            within = layer._flatten_layers() if isinstance(layer, keras.Layer) else []
            if folding and any(isinstance(inner, FoldableLayer) for inner in within):
                raise UnsupportedError(f"{layer.name}: it holds a DO-Conv layer inside; call that one's fold()")
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
    functional = isinstance(model, keras.Sequential) or (
        isinstance(model, keras.Model) and hasattr(model, "operations")
    )
    if not functional:
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
