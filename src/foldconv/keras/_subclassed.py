"""Subclassed models that were expanded, as ``.keras`` files: the user's own config, and the layers put into it."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import keras

from ..errors import UnsupportedError
from ._copying import Copier, attributes, config_of, original_class
from ._graph import is_graph
from .foldable import FoldableLayer
from .repvgg import NormPlace

_REGISTERED = "foldconv>Expanded"


@keras.saving.register_keras_serializable(package="foldconv", name="Expanded")
class Expanded:
    """Before a user's class: a model or layer in which other layers stand than its constructor makes.

    Its config is the user's own and the layers by their place (attributes, indices and keys; indices among the layers
    of a graph), so the user's class need not know of any of them.
    """

    _made_by_foldconv = True
    _expanded: dict[str, Any]  # "config": the user's; "plain": the same as Keras writes it, or why it cannot

    def get_config(self) -> dict[str, Any]:
        """The user's object as Keras serializes it, and the layers by place."""
        name, plain = self.name, self._expanded["plain"]  # pyright: ignore
        if isinstance(plain, str):
            raise UnsupportedError(f"{name}: Keras cannot save a {original_class(self).__name__}: {plain}")
        layers = {json.dumps(at): keras.saving.serialize_keras_object(one) for at, one in _places(self, (), set())}
        return {"plain": plain, "build": self.get_build_config(), "layers": layers}  # pyright: ignore

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """The user's object with the layers in their places; built only if it makes some of them in ``build``.

        Raises:
            UnsupportedError: where the user's class has no layer any more.
        """
        plain = keras.saving.deserialize_keras_object(config["plain"], custom_objects=custom_objects)
        places = {place: json.loads(place) for place in config["layers"]}
        by_build = bool(config.get("build")) and any(_absent(plain, at) for at in places.values())
        if by_build:
            plain.build_from_config(config["build"])
        wanted = {}
        for place, layer in config["layers"].items():
            if _absent(plain, places[place]):
                raise UnsupportedError(
                    f"{plain.name}: the file has a layer at {place}, where {type(plain).__name__} makes none; "
                    "give it the arguments and the code of the saved one"
                )
            layer = layer if by_build else _without_build(layer)
            at = _at(plain, places[place])
            wanted[id(at)] = keras.saving.deserialize_keras_object(layer, custom_objects=custom_objects)
        return Copier(lambda layer: wanted.get(id(layer)), lambda layer: id(layer) in wanted, mark).copy(plain)

    def build_from_config(self, config: dict[str, Any]) -> None:
        """As the user's class, but once: a second ``build`` would make layers anew."""
        if not self.built:  # pyright: ignore
            super().build_from_config(config)  # pyright: ignore


def mark(old: Any, new: Any) -> None:
    """Make of a user's object's copy an `Expanded` if layers stand in it that its class does not make."""
    if not any(isinstance(layer, (FoldableLayer, NormPlace)) for layer in new._flatten_layers(include_self=False)):
        return
    expanded: Any = vars(old).get("_expanded")
    if expanded is None:
        expanded = {"config": config_of(old)}
        try:
            expanded["plain"] = _unbuilt(old)
        except Exception as error:  # whatever Keras or the user's objects raise, it is raised when the model is saved
            expanded["plain"] = " ".join(str(error).split()) or type(error).__name__
    new.__class__ = _class_of(original_class(new))
    object.__setattr__(new, "_expanded", expanded)  # past Keras' tracking: no layer of the model is in it


_classes: dict[type, type] = {}


def _class_of(cls: type) -> type:
    if cls not in _classes:
        own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        made = type(cls.__name__, (Expanded, cls), {**own, "_made_by_foldconv": True})
        # Saved under one name, by which a process that has expanded nothing yet finds `Expanded`.
        keras.saving.register_keras_serializable(package="foldconv", name="Expanded")(made)
        keras.saving.get_custom_objects()[_REGISTERED] = Expanded
        _classes[cls] = made
    return _classes[cls]


def _unbuilt(layer: Any) -> dict[str, Any]:
    """What rebuilds a layer, without its weights: the user's object builds what is in it, by its own rules."""
    return _without_build(keras.saving.serialize_keras_object(layer))


def _without_build(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("build_config", "compile_config")}


def _places(value: Any, steps: tuple[Any, ...], seen: set[int]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The layers of ours in a layer, list or dict, with the first place of each."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (FoldableLayer, NormPlace)):
        yield steps, value
        return
    if isinstance(value, keras.Layer):
        inside: Any = enumerate(value.layers) if is_graph(value) else attributes(value).items()
    elif isinstance(value, dict):
        inside = value.items()
    else:
        inside = enumerate(value) if isinstance(value, (list, tuple)) else ()
    for step, one in inside:
        yield from _places(one, (*steps, step), seen)


def _at(found: Any, steps: list[Any]) -> Any:
    """What is at a place."""
    for step in steps:
        if is_graph(found):
            found = found.layers[step]
        else:
            found = found[step] if isinstance(found, (list, tuple, dict)) else getattr(found, step)
    return found


def _absent(found: Any, steps: list[Any]) -> bool:
    """Is nothing at a place?"""
    try:
        return _at(found, steps) is None
    except (AttributeError, IndexError, KeyError, TypeError):
        return True
