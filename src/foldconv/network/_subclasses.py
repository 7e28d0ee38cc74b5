"""Subclasses of torch's convolutions: which of them compute what the convolution does, and as which plain one."""

from __future__ import annotations

import abc
from typing import Any, Generic

from torch import nn

from ..algebra.convolutions import PLAIN, as_tuple
from ..layers.foldable import consistent, conv_arguments, plain_class

_NO_CHANGE = {"__init__", "extra_repr", "__repr__", "__str__", "reset_parameters", "init_weights", "_init_weights"}
"""What a subclass may define: how it is made, and how it is shown."""
_ABOUT_THE_CLASS = {"__module__", "__qualname__", "__doc__", "__annotations__", "__firstlineno__"}
_ABOUT_THE_CLASS |= {"__static_attributes__", "__parameters__", "__orig_bases__", "__slots__", "__constants__"}
_ABOUT_THE_CLASS |= {"__abstractmethods__", "_abc_impl", "__annotate_func__", "__annotations_cache__"}

# Other people's classes, by name so that none is imported: another forward whose function is known.
_SAME_PADDING = {"Conv2dSame"}
_STANDARDIZED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "ConvWS2d", "WSConv2d"}


def is_plain(module: nn.Module) -> bool:
    """Is the module one of torch's convolutions, or a subclass that changes nothing but how it is made?

    >>> class Three(nn.Conv2d):
    ...     def __init__(self, channels):
    ...         super().__init__(channels, channels, 3, padding=1)
    >>> is_plain(Three(4)), is_plain(nn.ReLU())
    (True, False)
    """
    base = plain_class(module)
    return base is not None and not any(_changes(cls, base) for cls in _own_classes(type(module), base))


def is_convolution(module: nn.Module) -> bool:
    """Does some plain convolution compute what the module does? `as_plain` makes it."""
    return is_plain(module) or _is_same_padded(module)


def why_not(module: nn.Module) -> str | None:
    """Why a subclass of a convolution is none that could be replaced."""
    if is_convolution(module):
        return None
    kind, base = type(module), plain_class(module)
    name = f"{kind.__module__}.{kind.__name__}"
    if kind.__name__ in _STANDARDIZED:
        return f"{name} standardizes its weight at each call, so its kernel is no parameter that could be composed"
    if kind.__name__ in _SAME_PADDING:
        return f"{name} with a stride pads by the size of its input, which no plain convolution does"
    changed = sorted(name for cls in _own_classes(kind, base) for name in _changes(cls, base))
    return f"{name} is a subclass with its own {', '.join(changed[:3])}, so it may compute another function"


def as_plain(conv: Any) -> Any:
    """The convolution itself; for a subclass or an edited one a plain one with the same parameters, not copies."""
    if type(conv) in PLAIN:
        return consistent(conv)
    cls: Any = plain_class(conv)
    arguments = conv_arguments(conv)
    if _is_same_padded(conv):
        arguments["padding"] = "same" if set(as_tuple(conv.stride, 2)) == {1} else 0
    plain = cls(**arguments, device="meta")
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain.train(conv.training)


def _own_classes(cls: type, base: Any) -> list[type]:
    return [c for c in cls.__mro__ if c not in base.__mro__ and c not in (abc.ABC, Generic)]


def _changes(cls: type, base: Any) -> list[str]:
    """What the class has that may change what its convolution computes, or that others may call on it."""
    known = _NO_CHANGE | _ABOUT_THE_CLASS
    # What only the class itself uses (torchvision's `get_downsample_stride`), under a name that torch does not know.
    beside = (staticmethod, classmethod, int, float, str, type(None))
    return [
        name
        for name, member in vars(cls).items()
        if name not in known and (hasattr(base, name) or not isinstance(member, beside))
    ]


def _is_same_padded(module: Any) -> bool:
    """Is it timm's convolution with TensorFlow's padding, where that does not depend on the size of the input?"""
    if type(module).__name__ not in _SAME_PADDING or plain_class(module) is not nn.Conv2d:
        return False
    # With a window of one sample there is nothing to pad.
    return set(as_tuple(module.stride, 2)) == {1} or set(as_tuple(module.kernel_size, 2)) == {1}
