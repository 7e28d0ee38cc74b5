"""Which norm follows which convolution, proven by tracing where the tensors go (torch.fx), never by name or order.

Symbolic tracing runs the forward once with stand-ins for tensors. It is a proof only where the forward cannot ask
a stand-in what it is, so a stand-in refuses such questions (its truth, its length, whether it is a tensor), and
the module that asked becomes opaque: what its inside does is unknown. Every choice of optional arguments given
and omitted is traced, and only what holds each time counts. Two questions cannot be refused: ``x is None`` and
``type(x)`` get the answer for some tensor.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import itertools
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError
from torch.overrides import TorchFunctionMode

from ..algebra.norms import is_norm
from ..errors import UnsupportedError
from ..layers import Foldable
from ..layers.foldable import PLAIN

_ABOUT = ("dtype", "device", "shape", "ndim", "is_cuda", "requires_grad")
_HARMLESS = [Tensor.size, Tensor.dim, *(getattr(Tensor, name).__get__ for name in _ABOUT)]


def conv_norm_pairs(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Each convolution (plain or foldable) whose only consumer is one norm, with that norm.

    Proven means: in the evaluation-mode graph the convolution is called once, its output goes to the norm and
    nowhere else, the norm is called once, and neither is used in any other way (its tensors read, hooks watching
    it, its weight tied, out of sight in a module that cannot be traced). Where a module cannot be traced but its
    source shows that it only calls a child, the child's inside is proven on its own.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        >>> [(type(conv).__name__, type(norm).__name__) for conv, norm in conv_norm_pairs(net).items()]
        [('Conv2d', 'BatchNorm2d')]
    """
    # Norms without running statistics trace like others; whether they can be absorbed is not a question of data flow.
    found = _Evidence()
    _collect(model, found)
    used = found.touched | found.read | set(_tied(model))
    return {
        conv: norm
        for conv, norm in found.pairs.items()
        if found.calls[conv] == found.calls[norm] == 1 and not {conv, norm} & used
    }


def read_elsewhere(model: nn.Module) -> set[nn.Module]:
    """Modules whose tensors the model's own code reads, as far as it can be traced.

    Example:
        >>> class Tied(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv = nn.Conv2d(1, 1, 3)
        ...     def forward(self, x):
        ...         return nn.functional.conv_transpose2d(self.conv(x), self.conv.weight)
        >>> read_elsewhere(Tied())
        {Conv2d(1, 1, kernel_size=(3, 3), stride=(1, 1))}
    """
    found = _Evidence()
    try:
        _collect(model, found)
    except UnsupportedError:
        return set()
    return found.read


@dataclasses.dataclass
class _Evidence:
    """What all traces together have shown."""

    touched: set[nn.Module] = dataclasses.field(default_factory=set)
    read: set[nn.Module] = dataclasses.field(default_factory=set)
    calls: Counter[nn.Module] = dataclasses.field(default_factory=Counter)
    pairs: dict[nn.Module, nn.Module] = dataclasses.field(default_factory=dict)
    opaque: set[nn.Module] = dataclasses.field(default_factory=set)
    traces: list[list[_Trace]] = dataclasses.field(default_factory=list)


def _collect(model: nn.Module, found: _Evidence) -> None:
    """Add what tracing `model` alone shows, and each module in it that can only be traced alone."""
    if isinstance(model, (*PLAIN, Foldable)) or is_norm(model):
        found.touched.add(model)  # called from where nobody can see
        return
    traces = _traces(model)
    if not traces:
        _look_inside(model, found)
        return
    found.traces.append(traces)
    called: Counter[nn.Module] = Counter()
    pairs = [trace.pairs() for trace in traces]
    for trace in traces:
        found.read |= trace.read_from()
        # Each trace tells of another call of the model, so the larger count is the model's.
        called |= Counter(module for _, module in trace.calls())
    found.calls += called
    for conv, norm in pairs[0].items():
        if all(other.get(conv) is norm for other in pairs):
            found.pairs[conv] = norm
    for module in called:
        if not isinstance(module, (*PLAIN, Foldable)) and not is_norm(module):
            _look_inside(module, found)


def _look_inside(opaque: nn.Module, found: _Evidence) -> None:
    """An opaque module may use whatever it holds in any way, except children that its source only calls."""
    held_here = _held(list(vars(opaque).values()))
    if not held_here or opaque in found.opaque:
        return
    found.opaque.add(opaque)
    sealed = _only_called(opaque)
    for held in held_here:
        if held in sealed:
            _collect(held, found)
        else:
            found.touched.update(held.modules())


# ---------------------------------------------------------------------- tracing


_MAY_ASK = ("torch.fx", "torch.nn.parameter", "torch.nn.modules.module", __name__)


class _Silent:
    """Asked for its class by a forward, or for a member that tensors do not have, it gives no answer."""

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleVariableOverride]
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_MAY_ASK):
            return type(self)
        raise TraceError("the forward asks for the class of a value")

    def __getattr__(self, name: str) -> fx.Proxy:
        if not hasattr(Tensor, name):
            raise TraceError(f"the forward asks a value for {name!r}")
        return _Member(self, name)  # pyright: ignore[reportArgumentType]


class _StandIn(_Silent, fx.Proxy):
    """fx's stand-in for a value."""


class _Member(_Silent, Attribute):
    """fx's stand-in for a member of a value."""


class _Tracer(fx.Tracer):
    """Traces through containers; layers, hooked containers, and containers that cannot be traced, are opaque."""

    # Reading a buffer is an event of the graph, like reading a parameter.
    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A hook on a container may see, keep and change anything that passes.
        return isinstance(m, Foldable) or is_norm(m) or hooked(m) or not any(True for _ in m.children())

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            # Whatever a forward does that stand-ins cannot follow. The nodes it has left behind stay: uses are uses.
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


class _Reads(TorchFunctionMode):
    """Notes every tensor that a torch function receives as itself, not as a stand-in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _HARMLESS:
            self.seen |= {id(value) for value in _leaves((args, kwargs)) if isinstance(value, Tensor)}
        return func(*args, **kwargs or {})


@dataclasses.dataclass
class _Trace:
    """One traced run: the graph, by whose names `modules` are found, and what the graph does not show."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    read: set[int]
    escaped: set[fx.Node]

    def calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        for node in self.graph.nodes:
            if node.op == "call_module":
                yield node, self.modules[str(node.target)]

    def pairs(self) -> dict[nn.Module, nn.Module]:
        called = dict(self.calls())
        pairs = {}
        for node, conv in called.items():
            if not (type(conv) in PLAIN or isinstance(conv, Foldable)) or len(node.users) != 1 or len(node.args) != 1:
                continue
            (user,) = node.users
            norm = called.get(user)
            alone = user.args == (node,) and not user.kwargs and node not in self.escaped
            if norm is not None and is_norm(norm) and alone and not _altered(conv) and not _altered(norm):
                pairs[conv] = norm
        return pairs

    def read_from(self) -> set[nn.Module]:
        """Modules whose tensors are read otherwise than by calling the module."""
        read = set()
        for node in self.graph.nodes:
            if node.op == "get_attr" and not all(_asks_about(user) for user in node.users):
                read.add(self.modules[str(node.target).rpartition(".")[0]])
        for module in self.modules.values():
            if any(id(t) in self.read for t in (*module._parameters.values(), *module._buffers.values())):
                read.add(module)
        return read


def _asks_about(node: fx.Node) -> bool:
    """Does the node use a tensor's type and shape only?"""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.target is getattr and node.args[1] in _ABOUT


def _traces(model: nn.Module) -> list[_Trace]:
    """The model's evaluation-mode traces, one for each choice of omitted arguments; none if one of them fails."""
    if "forward" in vars(model):
        return []
    shadow = _shadow(model)
    try:
        parameters = inspect.signature(type(model).forward).parameters.values()
    except ValueError:
        return []
    optional = [(p.name, p.default) for p in parameters if p.default is not p.empty]
    modules = dict(model.named_modules(remove_duplicate=False))
    traces = []
    if len(optional) > 4:
        return []
    for omitted in itertools.chain.from_iterable(itertools.combinations(optional, n) for n in range(len(optional) + 1)):
        try:
            with _Reads() as reads, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fx warns where it cannot insert a check of an omitted argument
                graph = _Tracer().trace(shadow, dict(omitted) or None)
        except Exception:
            return []
        kept = {value.node for m in shadow.modules() for value in _leaves(list(vars(m).values())) if _stands_in(value)}
        traces.append(_Trace(graph, modules, reads.seen, kept))
    return traces


def _shadow(model: nn.Module) -> nn.Module:
    """A copy with the same tensors, in evaluation mode: running its Python code leaves no trace in the model."""
    tensors = [
        value
        for module in model.modules()
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        if isinstance(value, Tensor)
    ]
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), which following its data flow "
            "needs; fold with batchnorm=False"
        ) from error


# ---------------------------------------------------------------------- what modules hold


def _leaves(value: Any) -> Iterator[Any]:
    if type(value) is tuple or isinstance(value, (list, set)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _stands_in(value: Any) -> bool:
    return issubclass(type(value), fx.Proxy)


def _held(value: Any) -> set[nn.Module]:
    return {leaf for leaf in _leaves(value) if isinstance(leaf, nn.Module)}


def _tied(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with a parameter that others hold too; scaling it for one would change or untie the other."""
    parameters = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for module in model.modules():
        if any(parameters[id(p)] > 1 for p in module._parameters.values() if p is not None):
            yield module


def hooked(module: nn.Module) -> bool:
    """Does anything watch the module's inputs, outputs or their gradients?"""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _altered(module: nn.Module) -> bool:
    return hooked(module) or "forward" in vars(module)


# ---------------------------------------------------------------------- what the source proves


_INNER = ("__dict__", "_modules", "_parameters", "_buffers")


def _only_called(module: nn.Module) -> set[nn.Module]:
    """The children that the module's own methods use in no other way than ``self.child(...)``.

    Conservative: a bare ``self`` (passed on, iterated over, given another name) or a look at torch's own members
    (``self.children()``, ``self._modules``) proves nothing about any child.
    """
    plain = {name: value for name, value in vars(module).items() if name != "_modules"}
    if "forward" in plain or _held(list(plain.values())) or hooked(module):
        return set()
    called = {name for name, child in module._modules.items() if child is not None}
    for cls in type(module).__mro__:
        for name, member in vars(cls).items() if cls not in (nn.Module, object) else ():
            for function in _functions(member) if name != "__init__" else ():
                bad = _bad_uses(module, function)
                if bad is None:
                    return set()
                called -= bad
    return {module._modules[name] for name in called}  # pyright: ignore[reportReturnType]


def _functions(member: Any) -> list[Any]:
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
    if not isinstance(function, ast.FunctionDef) or decorated or _held([known.nonlocals, known.globals]):
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
