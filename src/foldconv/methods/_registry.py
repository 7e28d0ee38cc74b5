"""The registry: a method is a frozen dataclass of its options; `register` makes its name known."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from ..errors import UnsupportedError, shown, unknown
from ..layers import Foldable

Init = Literal["preserve", "paper"]


def expect_init(init: object) -> None:
    """Raise an UnsupportedError for an unknown way to begin."""
    if not isinstance(init, str) or init not in ("preserve", "paper"):
        raise UnsupportedError(f"init: expected 'preserve' or 'paper', received {shown(init)}")


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods: options as fields (plain values that survive JSON), the rest as class attributes."""

    name: ClassVar[str]
    """What users write: ``expand(net, "doconv")``."""
    title: ClassVar[str]
    """What the paper calls it."""
    paper: ClassVar[str]
    """Where it was published."""
    adds: ClassVar[str]
    """What it adds to a convolution, in a few words."""
    gain: ClassVar[str]
    """A gain its paper reports."""
    kind: ClassVar[Literal["composable", "statistical"]]
    """composable: the kernel is composed while training; statistical: norms inside, folds in evaluation mode only."""

    takes_norm: ClassVar[bool] = False
    """Does the layer take in the norm that follows the convolution? `expand` and `reason_against` then get it."""

    changes_groups: ClassVar[bool] = False
    """May a layer fold to more groups than the convolution had? Shapes then differ from the plain network's."""

    def reason_against(self, conv: nn.Module, norm: nn.Module | None = None) -> str | None:
        """Why this method leaves a convolution as it is (a clause for a message), or None when it applies.

        `norm` is what follows the convolution and nothing else, as data flow proves; only with `takes_norm`.
        """
        raise NotImplementedError

    def expand(self, conv: nn.Module, init: Init = "preserve", norm: nn.Module | None = None) -> Foldable:
        """The foldable layer that takes the place of `conv` (and of `norm`), built from their own parameters."""
        raise NotImplementedError

    def penalty(self, layer: Any) -> Tensor | None:
        """What the method adds to the loss for a layer it made: a scalar with gradients; by default None, nothing.

        `foldconv.regularization` adds them up.
        """
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `method_from_json` reads them.

        >>> from foldconv import DOConv
        >>> DOConv(depth_multiplier=12).to_json()
        {'method': 'doconv', 'depth_multiplier': 12, 'composition': 'kernel'}
        """
        return {"method": self.name} | dataclasses.asdict(self)


_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method known by its name."""
    _METHODS[cls.name] = cls
    return cls


def list_methods() -> list[str]:
    """The names of all methods, sorted.

    >>> from foldconv import list_methods
    >>> "doconv" in list_methods()
    True
    """
    return sorted(_METHODS)


def get_method(name: str) -> type[Method]:
    """The config class of a method; call it with options, or without for the defaults.

    Raises:
        UnsupportedError: for an unknown name, with the nearest known one.

    >>> from foldconv import get_method
    >>> get_method("doconv")(depth_multiplier=12)
    DOConv(depth_multiplier=12, composition='kernel')
    """
    if not isinstance(name, str) or name not in _METHODS:
        raise UnsupportedError(unknown("method", name, list_methods()))
    return _METHODS[name]


def as_method(method: str | Method) -> Method:
    """A config from a name or a config."""
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        return get_method(method)()
    raise TypeError(f"method: expected a name or a config such as foldconv.DOConv(), received {method!r}")


def method_from_json(description: dict[str, Any]) -> Method:
    """The config written by `Method.to_json`.

    Raises:
        UnsupportedError: for an unknown method or option.

    >>> method_from_json({"method": "doconv", "depth_multiplier": 12})
    DOConv(depth_multiplier=12, composition='kernel')
    """
    options = dict(description)
    cls = get_method(str(options.pop("method", None)))
    known = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise UnsupportedError(f"method {cls.name!r}: {unknown('option', option, known)}")
    return cls(**options)


_PYTHONS = {"True": True, "False": False, "None": None}


def method_from_text(text: str) -> Method:
    """A method as command lines write it: a name, and options as in ``expandnet:rate=2:chain=CK``.

    Numbers, true, false and null are read as JSON, True, False and None as Python has them; anything else is text.

    Raises:
        UnsupportedError: for an unknown method or option.

    >>> method_from_text("expandnet:rate=2:chain=CK")
    ExpandNet(rate=2, chain='CK')
    >>> method_from_text("repvgg:moments=False") == method_from_text("repvgg:moments=false")
    True
    """
    name, *options = text.split(":")
    description: dict[str, Any] = {"method": name}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UnsupportedError(f"methods: expected NAME:KEY=VALUE, received {text!r}")
        try:
            description[key] = _PYTHONS[value] if value in _PYTHONS else json.loads(value)
        except ValueError:
            description[key] = value
    return method_from_json(description)
