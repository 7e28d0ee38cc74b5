"""What the source of a module's methods proves about its children, where running it proves nothing."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

from ..algebra.convolutions import PLAIN
from ..layers.foldable import is_watched
from ._tracing import ABOUT, leaves

OF_WEIGHTS = ("weight", "bias", "parameters", "named_parameters", "state_dict", "_parameters")
_NAMED = ("weight", "bias", "running_mean", "running_var")
ABOUT_TENSORS = {*ABOUT, "size", "dim", "numel", "is_floating_point", "is_contiguous"}
_LISTS = (nn.ModuleList, nn.ModuleDict)
_HARMLESS = {"super", "getattr", "hasattr", "isinstance", "type", "len", "iter", "enumerate", "zip", "reversed", "id"}
_INNER = ("__dict__", "_modules", "_parameters", "_buffers")


def only_called(module: nn.Module) -> set[nn.Module]:
    """The children that the module's own methods use in no other way than ``self.child(...)``.

    Conservative: a bare ``self`` (passed on, iterated over, given another name) or a look at torch's own members
    (``self.children()``, ``self._modules``) proves nothing about any child.
    """
    plain = {name: value for name, value in vars(module).items() if name != "_modules"}
    if "forward" in plain or held(list(plain.values())) or is_watched(module):
        return set()
    called = {name for name, child in module._modules.items() if child is not None}
    for cls in type(module).__mro__:
        for name, member in vars(cls).items() if cls not in (nn.Module, object) else ():
            for function in functions_of(member) if name != "__init__" else ():
                bad = _bad_uses(module, function)
                if bad is None:
                    return set()
                called -= bad
    return {module._modules[name] for name in called}  # pyright: ignore[reportReturnType]


def reads_weights(module: nn.Module) -> set[nn.Module]:
    """The modules inside whose ``weight`` or ``bias`` the forward's source asks for, or may ask for.

    For who changes weights while their module goes on being called: what the source does not name is taken as unread.
    """
    found: set[nn.Module] = set()
    todo, done = ["forward"], set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        # What a class overrides is read, too: it may be called by `super`.
        classes = [cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.") and cls is not object]
        tree, known = ast.Module([], []), {}
        for function in (f for cls in classes if name in vars(cls) for f in functions_of(vars(cls)[name])):
            with contextlib.suppress(OSError, TypeError, SyntaxError):
                tree.body += ast.parse(textwrap.dedent(inspect.getsource(function))).body
                known |= getattr(function, "__globals__", {})
        parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == "getattr":
                called = ast.unparse(parent[node])
                found.update(module.modules() if "'weight'" in called or "'bias'" in called else ())
            if isinstance(node, ast.Name) and node.id == "self" and _is_read_by_callee(node, parent, known):
                found.update(module.modules())
            if not isinstance(node, ast.Attribute):
                continue
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                todo.append(node.attr)
            around = parent.get(node)
            if isinstance(around, ast.keyword):
                around = parent.get(around)
            if node.attr in OF_WEIGHTS and not _asks_about(node, parent):
                path = _path(node.value)
                child = module._modules.get(path[0]) if path else None
                found.update((module if child is None else child).modules())
            elif (
                isinstance(around, ast.Call)
                and around.func is not node
                and "checkpoint" not in ast.unparse(around.func)
            ):
                # A function that gets a convolution may do more than call it.
                path = _path(node)
                child = module._modules.get(path[0]) if len(path) == 1 else None
                found.update([child] if child is not None and isinstance(child, PLAIN) else [])
    return found - {module}


def reads_by_name(module: nn.Module) -> set[nn.Module]:
    """The modules whose weights or statistics the forward's source names (``self.norm.weight``), run or not.

    For who follows the forward otherwise: what is read only with another attribute is seen by nobody else.
    """
    found: set[nn.Module] = set()
    for path in _named_in(type(module)):
        for inner in held([functools.reduce(lambda m, name: getattr(m, name, None), path, module)]):
            found.update(inner.modules() if isinstance(inner, _LISTS) else [inner])
    return found


@functools.lru_cache(maxsize=512)
def _named_in(cls: type) -> frozenset[tuple[str, ...]]:
    """The paths from ``self`` to what has its weights or statistics read in the forward, or in what that calls."""
    found: set[tuple[str, ...]] = set()
    todo, done = ["forward"], set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        for function in functions_of(inspect.getattr_static(cls, name, None)):
            if (getattr(function, "__module__", None) or "torch").partition(".")[0] == "torch":
                continue
            with contextlib.suppress(OSError, TypeError, SyntaxError):
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
                parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
                for node in ast.walk(tree):
                    if not isinstance(node, ast.Attribute):
                        continue
                    if isinstance(node.value, ast.Name) and node.value.id == "self":
                        todo.append(node.attr)
                    asked = isinstance(parent[node], ast.Compare) or _asks_about(node, parent)
                    if node.attr in _NAMED and not asked and (path := _path(node.value)):
                        found.add(tuple(path))
    return frozenset(found)


def _is_read_by_callee(node: ast.Name, parent: dict[ast.AST, ast.AST], known: dict[str, Any]) -> bool:
    """Does a function or a class get the module itself, and its source ask for weights, or is not to be had?"""
    around = parent.get(node)
    if isinstance(around, ast.keyword):
        around = parent.get(around)
    if not isinstance(around, ast.Call) or ast.unparse(around.func).rpartition(".")[2] in _HARMLESS:
        return False
    try:
        return any(_reads(callee) for callee in _called(around.func, parent, known))
    except (KeyError, AttributeError, OSError, TypeError, SyntaxError):
        return True


def _reads(callee: Any) -> bool:
    """Does the source of a function or a class ask for weights?"""
    tree = ast.parse(textwrap.dedent(inspect.getsource(callee)))
    parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    asked = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in OF_WEIGHTS)
    return any(not _asks_about(n, parent) for n in asked)


def _called(func: ast.expr, parent: dict[ast.AST, ast.AST], known: dict[str, Any]) -> list[Any]:
    """What a call may call: what its name stands for in the module, or each value that the function gives it.

    Raises:
        KeyError: neither is to be had.
    """
    first, *rest = ast.unparse(func).split(".")
    scope: ast.AST = func
    while not isinstance(parent[scope], ast.Module):
        scope = parent[scope]
    values: list[ast.expr] = []
    for node in ast.walk(scope):
        if first in (_bound(node), *((node.arg,) if isinstance(node, ast.arg) else ())):
            given = parent[node]
            if rest or not isinstance(given, ast.Assign) or node not in given.targets:
                raise KeyError(first)
            values += [given.value]
    for value in values or [func]:  # grows
        if isinstance(value, ast.IfExp):
            values += [value.body, value.orelse]
    names = [ast.unparse(value).split(".") for value in values or [func] if not isinstance(value, ast.IfExp)]
    return [functools.reduce(getattr, inner, known[outer]) for outer, *inner in names]


def _bound(node: ast.AST) -> str | None:
    """The name that a node gives a value to."""
    if isinstance(node, ast.alias):
        return (node.asname or node.name).partition(".")[0]
    return node.id if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) else None


def _asks_about(node: ast.AST, parent: dict[ast.AST, ast.AST]) -> bool:
    """Is only the type or shape of it asked for: ``conv.weight.dtype``, ``next(self.parameters()).device``?"""
    around = parent.get(node)
    while isinstance(around, ast.Call):
        node, around = around, parent.get(around)
    return isinstance(around, ast.Attribute) and around.attr in ABOUT_TENSORS


def _path(node: ast.expr) -> list[str]:
    """The names of ``self.a.b[0].c`` from the left; empty for anything else."""
    names: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        node = node.value
    return names[::-1] if isinstance(node, ast.Name) and node.id == "self" else []


def held(value: Any) -> set[nn.Module]:
    """The modules among what a value holds."""
    return {leaf for leaf in leaves(value) if issubclass(type(leaf), nn.Module)}  # a weak proxy only says it is one


def functions_of(member: Any) -> list[Any]:
    """The functions that a class member runs."""
    if isinstance(member, property):
        return [f for f in (member.fget, member.fset, member.fdel) if f is not None]
    if isinstance(member, (staticmethod, classmethod)):
        return [member.__func__]
    return [member] if callable(member) or hasattr(member, "__get__") else []


def _bad_uses(module: nn.Module, method: Any) -> set[str] | None:
    """Children that the method may use otherwise than by calling them; None if it may so use any."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(method))).body
        known = inspect.getclosurevars(method)
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    decorated = hasattr(method, "__wrapped__")
    if not isinstance(function, ast.FunctionDef) or decorated or held([known.nonlocals, known.globals]):
        return None
    parent = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    arguments = function.args.posonlyargs + function.args.args
    names = {"self", arguments[0].arg if arguments else "self"}
    bad: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id in names:
            use = parent[node]
            if not (isinstance(use, ast.Attribute) and use.value is node):
                return None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super":
            use = parent[node]
        elif isinstance(node, ast.Name) and node.id in ("locals", "vars", "globals", "eval", "exec"):
            return None
        else:
            continue
        if not isinstance(use, ast.Attribute):
            return None
        around, name = parent[use], use.attr
        if name in module._modules:
            call = isinstance(around, ast.Call) and around.func is use
            asked = isinstance(around, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in around.ops)
            if not call and not asked:
                bad.add(name)
        elif name in _INNER or getattr(type(module), name, None) is getattr(nn.Module, name, 0):
            return None
    return bad
