"""The methods that `expand` knows by name: each a frozen dataclass of its options, one file per method."""

# Keras is not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

import numpy as np

import keras

from ..errors import UnsupportedError, unknown
from ._copying import own_names


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods: options as fields, the rest as class attributes.

    Attributes:
        name: what users write.
        layers: the method's layer for each of Keras' own.
        takes_norm: does the layer take in the BatchNormalization that follows the convolution?
    """

    name: ClassVar[str]
    layers: ClassVar[dict[Any, Any]]
    takes_norm: ClassVar[bool] = False

    def reason_against(self, layer: Any, norm: Any = None) -> str | None:
        """Why a layer of one of the classes in `layers` stays as it is (a clause for a message), or None."""
        raise NotImplementedError

    def options_for(self, layer: Any, norm: Any = None) -> dict[str, Any]:
        """The arguments of the method's layer besides those of `layer`."""
        return dataclasses.asdict(self)

    def expand(self, layer: Any, norm: Any = None) -> Any:
        """The method's layer in the place of `layer`; built, and of the same function, if `layer` is built."""
        plain: Any = type(layer) if type(layer) in self.layers else plain_class(layer)
        try:
            new = self.layers[plain].from_config({**plain.get_config(layer), **self.options_for(layer, norm)})
        except TypeError as error:  # as which Keras raises ours
            if isinstance(error.__context__, UnsupportedError):
                raise UnsupportedError(f"{layer.name}: {error.__context__}") from None
            raise
        if layer.built:
            new.build_from_config(layer.get_build_config())
            own = {weight.name: weight for weight in layer.weights}
            for weight in new.weights:
                if weight.name in own:
                    # By way of NumPy: JAX would share the buffer, and a training step on one gives it away.
                    weight.assign(np.array(keras.ops.convert_to_numpy(own[weight.name])))
            new.trainable = layer.trainable
            self.preserve(new, norm)
        return new

    def preserve(self, layer: Any, norm: Any = None) -> None:
        """Change what is new in a layer so that it adds nothing yet; called where it has the trained weights."""


def plain_class(layer: Any) -> type:
    """Keras' class of a layer; of a subclass, too, that has only a constructor and ``get_config`` of its own.

    >>> class Conv3x3(keras.layers.Conv2D):
    ...     def __init__(self, filters, **kwargs):
    ...         super().__init__(filters, 3, **kwargs)
    >>> plain_class(Conv3x3(8)).__name__
    'Conv2D'
    """
    for cls in type(layer).__mro__ if isinstance(layer, keras.Layer) else ():
        if cls.__module__.startswith("keras."):
            own = len(layer.weights) - getattr(layer, "use_bias", False) if layer.built else 1
            return type(layer) if own > 1 or layer._layers or "call" in vars(layer) else cls
        if own_names(cls) - {"__init__", "get_config"}:
            break
    return type(layer)


_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method known by its name."""
    _METHODS[cls.name] = cls
    return cls


def list_methods() -> list[str]:
    """The names of all methods.

    >>> list_methods()
    ['doconv', 'orepa', 'repvgg']
    """
    return sorted(_METHODS)


def method_of(name: str | Method, options: dict[str, Any]) -> Method:
    """The method of a name with options; a config as it is.

    Raises:
        UnsupportedError: for an unknown name or option, with the nearest known one.

    >>> method_of("doconv", {"depth_multiplier": 12})
    DOConv(depth_multiplier=12)
    """
    if isinstance(name, Method):
        return dataclasses.replace(name, **options)
    if name not in _METHODS:
        raise UnsupportedError(f"{unknown('method', name, list_methods())} (those there are for Keras)")
    cls = _METHODS[name]
    known = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise UnsupportedError(f"method {name!r}: {unknown('option', option, known)}")
    return cls(**options)
