"""What a forward may write outside of the model that runs it, put back afterwards.

A copy of a model shares no tensor of the model's own; what stands in its classes, in modules of Python's or in closures
is everybody's.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_CONTAINERS = (list, dict, set, collections.deque)


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Afterwards the generators of random numbers, the model's classes and all tensors of others are as before.

    Not so module-level variables that a forward binds anew.
    """
    numpy: Any = sys.modules.get("numpy")
    state, numpys = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    classes = {cls for m in model.modules() for cls in type(m).__mro__ if cls.__module__.partition(".")[0] != "torch"}
    before = {cls: _of(cls) for cls in classes - {object}}
    contents = [(value, copy.copy(value)) for value in _containers(before)]
    writes = _Writes(model)
    try:
        with torch.random.fork_rng(devices), writes:
            yield
    finally:
        writes.undo()
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpys)
        for cls, attributes in before.items():
            _put_back_attributes(cls, attributes)
        for container, content in contents:
            _put_back_content(container, content)


class _Writes(TorchDispatchMode):
    """Keeps a copy of whatever is written to and was there before, but for the parameters and buffers of a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        # A tensor that was there before has an address that none made since can have.
        self.made = set(_storages([*model.parameters(), *model.buffers()]))
        self.saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _storages(pytree.tree_leaves((args, kwargs)))
        for argument, value in zip(func._schema.arguments, args):
            # torch's schemas do not say that batch norms write their statistics.
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name.startswith("running_"):
                self._save(value)
        for value in (kwargs or {}).values() if func._schema.is_mutable else ():
            self._save(value)
        result = func(*args, **kwargs or {})
        self.made |= _storages(pytree.tree_leaves(result)).keys() - given.keys()
        return result

    def _save(self, value: Any) -> None:
        for address, storage in _storages(pytree.tree_leaves(value)).items():
            if address not in self.made and address not in self.saved:
                self.saved[address] = storage, storage.clone()

    def undo(self) -> None:
        """Write what was there before."""
        for storage, content in self.saved.values():
            storage.copy_(content)


def _storages(values: Iterable[Any]) -> dict[int, torch.UntypedStorage]:
    found = {}
    for value in values:
        if isinstance(value, Tensor) and not torch.nn.parameter.is_lazy(value):
            with contextlib.suppress(NotImplementedError, RuntimeError):  # sparse ones have none
                storage = value.untyped_storage()
                found[storage._cdata] = storage
    return found


def _of(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


def _containers(value: Any) -> list[Any]:
    """What can be written to among the containers in a container, at any depth."""
    found, todo = {id(value): value}, [value]
    while todo:
        value = todo.pop()
        for item in value.values() if isinstance(value, dict) else value:
            if issubclass(type(item), (*_CONTAINERS, tuple)) and id(item) not in found:
                found[id(item)] = item
                todo.append(item)
    return [item for item in found.values() if not isinstance(item, tuple)]


def _put_back_attributes(cls: type, attributes: dict[str, Any]) -> None:
    now = _of(cls)
    for name in now.keys() - attributes.keys():
        type.__delattr__(cls, name)
    for name, value in attributes.items():
        if now.get(name, now) is not value:
            type.__setattr__(cls, name, value)


def _put_back_content(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        same = list(map(id, container)) == list(map(id, content)) and all(container[k] is content[k] for k in content)
    else:
        same = list(map(id, container)) == list(map(id, content))
    if same:
        return
    container.clear()
    (container.extend if isinstance(container, (list, collections.deque)) else container.update)(content)
