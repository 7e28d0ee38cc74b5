"""Subclassed models that were expanded, as ``.keras`` files: the user's own config, and the layers put into it."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import json
from typing import Any

import keras

from ..errors import UnsupportedError
from ._copying import Copier, Steps, original_class
from ._graph import is_graph

_REGISTERED = "foldconv>Expanded"


@keras.saving.register_keras_serializable(package="foldconv", name="Expanded")
class Expanded:
    """Before a user's class: a model or layer in which other layers stand than its constructor makes.

    Its config is the user's own and the layers by their place, so the user's class need not know of any of them.
    """

    _made_by_foldconv = True
    _expanded: dict[str, Any]  # "plain": the user's config or why there is none; "places": the original class by place

    def get_config(self) -> dict[str, Any]:
        """The user's object as Keras serializes it, and the layers by place."""
        name, plain = self.name, self._expanded["plain"]  # pyright: ignore
        if isinstance(plain, str):
            raise UnsupportedError(f"{name}: Keras cannot save a {original_class(self).__name__}: {plain}")
        layers = {}
        for place, origin in self._expanded["places"].items():
            steps = json.loads(place)
            if None in steps:
                raise UnsupportedError(
                    f"{name}: a replaced layer is held where no attribute, list or dict leads to; "
                    "hold it in one of them to save the model"
                )
            layers[place] = {"was": origin, "is": _unbuilt(_at(self, steps))}
        return {"plain": plain, "layers": layers}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """The user's object with the layers in their places, not built.

        Raises:
            UnsupportedError: where the user's class has no layer any more.
        """
        plain = keras.saving.deserialize_keras_object(config["plain"], custom_objects=custom_objects)
        wanted = dict(config["layers"])

        def replace(layer: Any, steps: Steps) -> Any:
            found = wanted.pop(json.dumps(steps), None)
            if found is None:
                return None
            return keras.saving.deserialize_keras_object(found["is"], custom_objects=custom_objects)

        def finish(old: Any, new: Any, replaced: dict[Steps, tuple[Any, Any]]) -> Any:
            return mark(old, new, replaced, plain=config["plain"])

        origins = {layer["was"] for layer in config["layers"].values()}
        new = Copier(replace, lambda layer: type(layer).__name__ in origins, finish).copy(plain)
        if wanted:
            raise UnsupportedError(
                f"{plain.name}: the file has a layer at {next(iter(wanted))}, where {type(plain).__name__} makes none; "
                "give it the arguments and the code of the saved one"
            )
        return new


def mark(old: Any, new: Any, replaced: dict[Steps, tuple[Any, Any]], plain: Any = None) -> Any:
    """Make of a copy an `Expanded` if other layers stand in it than its class makes; see `Copier`."""
    before = vars(old).get("_expanded") or {"plain": plain, "places": {}}
    places = dict(before["places"])
    for steps, (layer, replacement) in replaced.items():
        place = json.dumps(steps)
        origin = places.pop(place, type(layer).__name__)
        if type(replacement).__name__ != origin:
            places[place] = origin
    # What Keras makes wraps and describes the layers inside by itself.
    if not places or original_class(new).__module__.partition(".")[0] == "keras":
        return new
    if before["plain"] is None:
        try:
            before["plain"] = _unbuilt(old)
        except Exception as error:  # whatever the user's get_config raises, it does so when the model is saved
            before["plain"] = " ".join(str(error).split()) or type(error).__name__
    new.__class__ = _class_of(original_class(new))
    # Past Keras' tracking: no layer is in it.
    object.__setattr__(new, "_expanded", {"plain": before["plain"], "places": places})
    return new


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
    config = keras.saving.serialize_keras_object(layer)
    return {key: value for key, value in config.items() if key not in ("build_config", "compile_config")}


def _at(model: Any, steps: list[Any]) -> Any:
    """What is at a place."""
    found = model
    for step in steps:
        if is_graph(found):
            found = found.layers[step]
        else:
            found = found[step] if isinstance(found, (list, tuple, dict)) else getattr(found, step)
    return found
