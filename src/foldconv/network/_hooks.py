"""What users' hooks read: no look at a forward runs them, since they may change what is anybody's.

They are judged by their bytecode, for the source of a hook is often a part of a line.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from ._computed import is_computing
from ._sources import ABOUT_TENSORS, OF_WEIGHTS

_MONITORS = ("torch", "wandb")
"""Whose hooks look at weights and change no output."""


def read_by_hooks(module: nn.Module) -> set[nn.Module]:
    """The modules within reach of this one's forward hooks, if one of them asks for weights."""
    found: set[nn.Module] = set()
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        functions = {} if is_computing(hook) else _functions_of(hook, {})
        if any(_asks_for_weights(code) for function in functions for code in _codes_in(function.__code__)):
            owners = [owner for owner in (module, *functions.values()) if isinstance(owner, nn.Module)]
            found.update(inner for owner in owners for inner in owner.modules())
    return found


def _functions_of(hook: Any, found: dict[types.FunctionType, Any]) -> dict[types.FunctionType, Any]:
    """The hook's own function and those that it names, each with the object whose method it is."""
    if isinstance(hook, functools.partial):
        for part in (hook.func, *hook.args, *hook.keywords.values()):
            _functions_of(part, found)
        return found
    if not isinstance(hook, (types.FunctionType, types.MethodType)):
        hook = getattr(hook, "__call__", None)  # noqa: B004
    owner, function = getattr(hook, "__self__", None), getattr(hook, "__func__", hook)
    if not isinstance(function, types.FunctionType) or function in found:
        return found
    if str(function.__module__).partition(".")[0] in _MONITORS:
        return found
    found[function] = owner
    named: list[Any] = []
    for name in {name for code in _codes_in(function.__code__) for name in code.co_names}:
        method = None if owner is None else inspect.getattr_static(type(owner), name, None)
        named += [function.__globals__.get(name)]
        named += [types.MethodType(method, owner)] if isinstance(method, types.FunctionType) else []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # nothing in it yet
            named.append(cell.cell_contents)
    for value in named:
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            _functions_of(value, found)
    return found


def _codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes_in(constant)


def _asks_for_weights(code: types.CodeType) -> bool:
    """For more than their type and shape, or whether there are any."""
    steps = list(dis.get_instructions(code))
    for step, after, last in zip(steps, steps[1:], [*steps[2:], steps[-1]]):
        asked = after.argval in ABOUT_TENSORS or "NONE" in after.opname or last.opname == "IS_OP"
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in OF_WEIGHTS and not asked:
            return True
    return not {"weight", "bias"}.isdisjoint(each for each in code.co_consts if isinstance(each, str))
