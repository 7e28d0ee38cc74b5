"""Of which layers a forward asks the class, as its source tells: another layer in their place changes the answer.

A layer that composes its kernel is an instance of the convolution's class, and only of its class is it no more; layers
of branches, and what stands in the place of their norms, are not.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ._sources import functions_of


def asked_for_class(module: nn.Module) -> tuple[set[nn.Module], set[nn.Module]]:
    """The modules inside whose class the forward asks for: exactly, or for a part of its name; by ``isinstance``."""
    exact, bases = _asked(type(module))
    words = [each.lower() for each in exact if isinstance(each, str)]
    inside = list(module.modules()) if exact or bases else []
    return (
        {m for m in inside if type(m) in exact or any(word in type(m).__name__.lower() for word in words)},
        {m for m in inside if isinstance(m, tuple(bases))},
    )


@functools.lru_cache(maxsize=512)
def _asked(cls: type) -> tuple[frozenset[type | str], frozenset[type]]:
    """The classes of modules, and the words, that the class of something else than ``self`` is compared with; and the
    classes of which something may be an instance.

    In the forward and in what that calls of the class's own functions and its package's, as far as names tell.
    """
    exact: set[type | str] = set()
    bases: set[type | str] = set()
    todo: list[Any] = _members(cls, "forward")
    for function in todo:  # grows
        tree = _source_of(function)
        parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        known = {**vars(builtins), **getattr(function, "__globals__", {}), "self": cls}
        given = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and _is_class_of_another(node.value)]
        same = {ast.unparse(node.targets[0]) for node in given}  # kind = type(x)
        for node in ast.walk(tree):
            callee = None
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                todo += [each for each in _members(cls, node.attr) if each not in todo]
            elif isinstance(node, ast.Call):
                callee = _resolved(node.func, known)
                asks = callee is isinstance or callee is issubclass
                if asks and len(node.args) == 2 and ast.unparse(node.args[0]) != "self":
                    bases.update(_values(node.args[1], known))
            elif isinstance(node, ast.MatchClass):
                bases.update(_values(node.cls, known))
            if isinstance(callee, types.FunctionType) and callee not in todo and _package(callee) == _package(cls):
                todo.append(callee)
            if _is_class_of_another(node) or (isinstance(node, ast.Name) and node.id in same):
                exact.update(each for other in _others(node, parent) for each in _values(other, known))
    return (
        frozenset(each for each in exact if (issubclass(each, nn.Module) if isinstance(each, type) else each)),
        frozenset(each for each in bases if isinstance(each, type) and issubclass(each, nn.Module)) - {nn.Module},
    )


def _members(cls: type, name: str) -> list[Any]:
    """The functions behind a name of a class, those that it overrides as well: ``super`` may call them."""
    return [each for base in cls.__mro__ for each in functions_of(vars(base).get(name))]


def _package(of: Any) -> str:
    return str(getattr(of, "__module__", None) or "builtins").partition(".")[0]


def _source_of(function: Any) -> ast.AST:
    """Nothing for torch's own functions, and where there is none."""
    if _package(function) not in ("torch", "builtins"):
        with contextlib.suppress(OSError, TypeError, SyntaxError):
            return ast.parse(textwrap.dedent(inspect.getsource(function)))
    return ast.Module([], [])


def _is_class_of_another(node: ast.AST) -> bool:
    """Is this ``type(x)`` or ``x.__class__``, of anything but ``self``?"""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type":
        of = node.args[0] if len(node.args) == 1 else None
    else:
        of = node.value if isinstance(node, ast.Attribute) and node.attr == "__class__" else None
    return of is not None and ast.unparse(of) != "self"


def _others(node: ast.AST, parent: Mapping[ast.AST, ast.AST]) -> list[ast.expr]:
    """What a class, or its name however spelled, is compared with, looked up in or asked for."""
    around = parent[node]
    while node in (getattr(around, "value", None), getattr(around, "func", None)):
        if isinstance(around, ast.Call) and around.args:  # startswith
            return list(around.args)
        if not isinstance(around, (ast.Attribute, ast.Call)):
            return []
        node, around = around, parent[around]
    if isinstance(around, ast.Compare):
        return [each for each in (around.left, *around.comparators) if each is not node]
    if isinstance(around, ast.Subscript):  # a table of classes
        return [around.value]
    if isinstance(around, ast.Call) and isinstance(around.func, ast.Attribute) and around.func.attr == "get":
        return [around.func.value]
    return []


def _values(node: ast.expr, known: Mapping[str, Any]) -> Iterator[type | str]:
    """The classes and words that an expression stands for, as far as names tell."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
        for inner in node.keys if isinstance(node, ast.Dict) else node.elts:
            yield from () if inner is None else _values(inner, known)
        return
    value = node.value if isinstance(node, ast.Constant) else _resolved(node, known)
    for each in value if isinstance(value, (tuple, list, set, frozenset, dict)) else [value]:
        if isinstance(each, (type, str)):
            yield each


def _resolved(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """What ``a.b.c`` stands for; None, where names do not tell."""
    first, *rest = ast.unparse(node).split(".")
    value = known.get(first)
    for name in rest:
        value = inspect.getattr_static(value, name, None)
    return value
