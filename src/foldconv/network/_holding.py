"""What a network's attributes hold, at any depth: modules are exchanged there, tensors are found.

Parents hold modules by registration, and some also in tuples, sets, deques, partials, objects of their own. `Exchange`
looks through all of them first and notes what it would write; nothing is written before `commit`, so that a place where
no other module can be put is refused while everything is as it was.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError

_ATOMS = (type(None), int, float, complex, str, bytes, type, types.ModuleType, types.CodeType)
# Types of the standard library and of torch hold no modules of the user's, but for these.
_HOLDERS = {"builtins", "collections", "functools", "types", "itertools", "dataclasses", "argparse", "contextlib"}
_LEFT_OUT = (frozenset(sys.stdlib_module_names) | {"torch", "numpy"}) - _HOLDERS


_EMPTY = (dict, OrderedDict, list, set, tuple)


def holds_nothing(value: Any) -> bool:
    """Is it a plain value, or an empty container without attributes?"""
    kind = type(value)
    return kind in _ATOMS or kind is bool or (kind in _EMPTY and not value and not getattr(value, "__dict__", None))


class Exchange:
    """New modules for old ones, wherever `of` is led.

    Args:
        replacements: the new module for each old one.
        unwrapped: what takes the place of a module that wraps another; a module itself, if it wraps none.

    Attributes:
        tensors, references: all tensors and all weak references that were met.
    """

    def __init__(
        self,
        replacements: dict[nn.Module, nn.Module],
        unwrapped: Callable[[nn.Module], nn.Module] = lambda module: module,
    ):
        self.tensors: list[Tensor] = []
        self.references: list[Any] = []
        self._replacements, self._unwrapped = replacements, unwrapped
        self._writes: list[Callable[[], Any]] = []
        self._seen: dict[int, tuple[Any, Any]] = {}

    def commit(self) -> None:
        """Write what was noted."""
        for write in self._writes:
            write()

    def of(self, value: Any, where: str = "") -> Any:
        """The value with new modules for old; another object only where this one cannot be changed in place."""
        kind = type(value)
        # Asking `isinstance` would ask the value, which may be a stand-in for something else.
        if issubclass(kind, _ATOMS):
            return value
        if id(value) in self._seen:
            return self._seen[id(value)][1]
        self._seen[id(value)] = value, value
        new = self._exchanged(value, kind, where)
        self._seen[id(value)] = value, new
        return new

    def _exchanged(self, value: Any, kind: type, where: str) -> Any:
        if issubclass(kind, Tensor):
            self.tensors.append(value)
        elif issubclass(kind, nn.Module):
            return self._module(value, where)
        elif issubclass(kind, dict):
            self._dict(value, where)
        elif issubclass(kind, (list, deque)):
            self._in_place(value, where, lambda items: (value.clear(), value.extend(items)))
        elif issubclass(kind, set):
            self._in_place(value, where, lambda items: (value.clear(), value.update(items)))
        elif issubclass(kind, (tuple, frozenset)):
            return self._rebuilt(value, kind, where)
        elif issubclass(kind, functools.partial):
            func, args, keywords, own = value.__reduce__()[2]
            # Keywords and attributes are changed in place, if at all.
            state = self.of(func, where), self.of(args, where), self.of(keywords, where), self.of(own, where)
            if state[0] is not func or state[1] is not args:
                self._writes.append(lambda: value.__setstate__(state))
        elif issubclass(kind, types.MethodType):
            return self._method(value, where)
        elif issubclass(kind, types.FunctionType):
            self._function(value, where)
        elif issubclass(kind, (weakref.ref, *weakref.ProxyTypes)):
            return self._reference(value, kind)
        elif issubclass(kind, (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)):
            self._weak(value, where)
        elif kind.__module__ == "numpy" and getattr(getattr(value, "dtype", None), "hasobject", False):
            self._in_place(value.flat, where, lambda items: value.flat.__setitem__(slice(None), items))
        elif kind.__module__.partition(".")[0] not in _LEFT_OUT:
            self._object(value, kind, where)
        return value

    # ------------------------------------------------------------------ kinds of holders

    def _reference(self, value: Any, kind: type) -> Any:
        """A weak reference to the new module; what it leads to is not looked into, for it may be anybody's."""
        self.references.append(value)
        try:
            # A proxy of a module gives that away as the owner of a method.
            proxied = getattr(value, "forward", None) if kind in weakref.ProxyTypes else None
            target: Any = getattr(proxied, "__self__", None) if kind in weakref.ProxyTypes else value()
        except ReferenceError:
            return value
        method = target.__func__.__name__ if isinstance(target, types.MethodType) else None
        owner: Any = target if method is None else target.__self__
        new = self._replacements.get(owner) if issubclass(type(owner), nn.Module) else None
        if new is None:
            return value
        if method is not None:
            return weakref.WeakMethod(getattr(new, method))
        return weakref.ref(new, value.__callback__) if issubclass(kind, weakref.ref) else weakref.proxy(new)

    def _weak(self, value: Any, where: str) -> None:
        for item in list(value.values() if isinstance(value, weakref.WeakKeyDictionary) else ()):
            self.of(item, where)
        for key, item in list(value.items()) if hasattr(value, "items") else [(item, item) for item in value]:
            old = item if isinstance(value, weakref.WeakValueDictionary) else key
            new = self._replacements.get(old) if issubclass(type(old), nn.Module) else None
            if new is None:
                continue
            if isinstance(value, weakref.WeakSet):
                self._writes.append(functools.partial(lambda old, new: (value.discard(old), value.add(new)), old, new))
            elif isinstance(value, weakref.WeakValueDictionary):
                self._writes.append(functools.partial(value.__setitem__, key, new))
            else:
                self._writes.append(functools.partial(lambda a, b: value.__setitem__(b, value.pop(a)), old, new))

    def _module(self, module: nn.Module, where: str) -> nn.Module:
        if (inner := self._unwrapped(module)) is not module:
            return self.of(inner, where)
        new = self._replacements.get(module, module)
        if new is module:
            children: Any = vars(module).get("_modules", {})
            for name, child in list(children.items()):
                put = self.of(child, f"{where}.{name}" if where else name)
                if put is not child:
                    self._writes.append(functools.partial(children.__setitem__, name, put))
            self._attributes(vars(module), where)
        else:
            # What the new one has of its own was built for it; what it was given hung on the old one.
            given = {name for name, value in vars(new).items() if vars(module).get(name) is value}
            self._attributes(vars(new), where, given)
        return new

    def _attributes(self, attributes: dict[str, Any], where: str, names: Iterable[str] | None = None) -> None:
        for name in list(attributes if names is None else names):
            old = attributes[name]
            if holds_nothing(old):  # most of what a module has: flags, and hooks that nobody registered
                continue
            new = self.of(old, f"{where}.{name}" if where else name)
            if new is not old:
                self._writes.append(functools.partial(attributes.__setitem__, name, new))

    def _dict(self, value: dict, where: str) -> None:
        old = list(value.items())
        new = [
            (key if type(key) is str else self.of(key, f"{where}'s keys"), self.of(item, f"{where}[{key!r:.40}]"))
            for key, item in old
        ]
        if any(a[0] is not b[0] for a, b in zip(old, new)):
            self._writes.append(lambda: (value.clear(), [value.__setitem__(*pair) for pair in new]))
        else:
            changed = [pair for pair, (_, item) in zip(new, old) if pair[1] is not item]
            self._writes += [functools.partial(value.__setitem__, *pair) for pair in changed]
        default = getattr(value, "default_factory", None)
        if default is not None and self.of(default, where) is not default:
            self._writes.append(lambda: setattr(value, "default_factory", self.of(default)))
        self._attributes(getattr(value, "__dict__", {}), where)

    def _items(self, value: Iterable, where: str) -> tuple[list[Any], bool]:
        old = list(value)
        new = [self.of(item, f"{where}[{i}]") for i, item in enumerate(old)]
        return new, any(a is not b for a, b in zip(old, new))

    def _in_place(self, value: Any, where: str, write: Callable[[list[Any]], Any]) -> None:
        items, changed = self._items(value, where)
        if changed:
            self._writes.append(functools.partial(write, items))
        self._attributes(getattr(value, "__dict__", {}), where)

    def _rebuilt(self, value: Any, kind: type, where: str) -> Any:
        items, changed = self._items(value, where)
        self._attributes(getattr(value, "__dict__", {}), where)
        if not changed:
            return value
        make: Any = tuple if issubclass(kind, tuple) else frozenset
        try:
            new = make.__new__(kind, items)  # no constructor of a user's own is asked
        except TypeError:
            self._refuse(value, where)
        if hasattr(value, "__dict__"):
            self._writes.append(lambda: new.__dict__.update(value.__dict__))
        return new

    def _method(self, value: types.MethodType, where: str) -> Any:
        owner = self.of(value.__self__, where)
        self.of(value.__func__, where)
        if owner is value.__self__:
            return value
        new = getattr(owner, value.__func__.__name__, None)
        if not isinstance(new, types.MethodType):
            self._refuse(value, where)
        return new

    def _function(self, value: types.FunctionType, where: str) -> None:
        for cell in value.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # nothing in it yet
                continue
            new = self.of(held, f"{where} (a name of {value.__qualname__})")
            if new is not held:
                self._writes.append(functools.partial(setattr, cell, "cell_contents", new))
        for name in ("__defaults__", "__kwdefaults__"):
            held = getattr(value, name)
            new = self.of(held, f"{where} (a default of {value.__qualname__})")
            if new is not held:
                self._writes.append(functools.partial(setattr, value, name, new))
        self._attributes(vars(value), where)

    def _object(self, value: Any, kind: type, where: str) -> None:
        slots = [
            name
            for cls in (kind.__mro__ if kind.__module__ != "builtins" else ())
            for name, member in vars(cls).items()
            if type(member) is types.MemberDescriptorType
        ]
        for name in slots:
            held = getattr(value, name, None)
            new = self.of(held, f"{where}.{name}")
            if new is not held:
                self._writes.append(functools.partial(object.__setattr__, value, name, new))
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            self._attributes(attributes, where)
        elif not slots:
            # An iterator, a view, an object of C: what it holds can be seen, but not exchanged.
            for held in gc.get_referents(value):
                if self.of(held, where) is not held:
                    self._refuse(value, where)

    def _refuse(self, value: Any, where: str) -> Any:
        raise UnsupportedError(
            f"{where or 'the model'} holds a module to be replaced in a {type(value).__name__}, where no other can be "
            "put; hold it in a list, or as a plain attribute"
        )
