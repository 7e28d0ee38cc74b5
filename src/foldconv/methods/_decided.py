"""`decided`: what was decided about a tree of modules, until something in it changes.

How a block runs depends on the attributes, hooks, children and tensors of all modules in it. To look at all that in
each forward took longer than to run small maps; to see that nothing has changed is a few comparisons of whole dicts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
MOST = 16
"""Keys, of inputs' sizes, that are known of a module at a time."""


def decided(module: nn.Module, key: Hashable, decide: Callable[[], T]) -> T:
    """What `decide` gave for the key when the tree of modules was last found changed, or gives now.

    Seen are attributes that are set (lists that change, too), hooks, children, and which tensors there are, with their
    shapes, types and devices; not their values. What is decided must not hold `module` itself, only its children.

    Example:
        >>> conv = nn.Conv2d(1, 1, 3)
        >>> [decided(conv, "padding", lambda: conv.padding) for conv.padding in ((1, 1), (1, 1), (2, 2))]
        [(1, 1), (1, 1), (2, 2)]
    """
    found = _known.get(module)
    if found is None or not found.holds(module):
        found = _known[module] = _Known(module)
    known = found.decisions
    if key in known:
        return known[key]
    if len(known) >= MOST:
        found.decisions = known = {}
    known[key] = decision = decide()
    return decision


class _Known:
    """A tree as it was, and what was decided then."""

    def __init__(self, root: nn.Module):
        self.decisions: dict[Any, Any] = {}
        # The root is asked for again: what holds it would keep it alive.
        modules = [(None if m is root else m, m) for m in root.modules()]
        self._modules = [(held, type(m), _attributes(m), dict(m._modules)) for held, m in modules]
        self._tensors = [
            (held, kind, name, tensor, None if tensor is None else (tensor.shape, tensor.dtype, tensor.device))
            for held, m in modules
            for kind in ("_parameters", "_buffers")
            for name, tensor in vars(m)[kind].items()
        ]

    def holds(self, root: nn.Module) -> bool:
        """Is all as it was, and does no hook watch?"""
        try:
            for module, cls, attributes, children in self._modules:
                module = root if module is None else module
                now = module.__dict__
                if (
                    module.__class__ is not cls
                    or now != attributes
                    or now["_modules"] != children
                    or now["_forward_hooks"]
                    or now["_forward_pre_hooks"]
                    or now["_backward_hooks"]
                    or now["_backward_pre_hooks"]
                ):
                    return False
            for module, kind, name, tensor, like in self._tensors:
                now = (root if module is None else module).__dict__[kind].get(name, self)
                if now is not tensor:
                    return False
                if like is not None and (now.shape != like[0] or now.dtype != like[1] or now.device != like[2]):
                    return False
        except (KeyError, RuntimeError, TypeError, ValueError):  # attributes that cannot be compared: tensors, arrays
            return False
        return True


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value.copy() if type(value) is list else value for name, value in vars(module).items()}


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
