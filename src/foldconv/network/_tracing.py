"""One model traced by torch.fx: the graph of its evaluation-mode forward, as far as stand-ins for tensors can go.

Symbolic tracing runs the forward once with stand-ins for tensors. It is a proof only where the forward cannot ask
a stand-in what it is, so a stand-in refuses such questions (its truth, its length, whether it is a tensor), and
the module that asked becomes opaque: what its inside does is unknown. Two questions cannot be refused: ``x is None``
and ``type(x)`` get the answer for some tensor.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError
from torch.overrides import TorchFunctionMode

from ..algebra.convolutions import PLAIN
from ..algebra.norms import is_norm
from ..layers import Foldable
from ..layers.foldable import is_watched
from .tree import shadow_of

_ABOUT = ("dtype", "device", "shape", "ndim", "is_cuda", "requires_grad")
_HARMLESS = [Tensor.size, Tensor.dim, *(getattr(Tensor, name).__get__ for name in _ABOUT)]

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
        return isinstance(m, Foldable) or is_norm(m) or is_watched(m) or not any(True for _ in m.children())

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
            self.seen |= {id(value) for value in leaves((args, kwargs)) if isinstance(value, Tensor)}
        return func(*args, **kwargs or {})


@dataclasses.dataclass
class Trace:
    """One traced run: the graph, by whose names `modules` are found, and what the graph does not show.

    `read` holds the ids of tensors that torch functions met as themselves, `escaped` the nodes whose values were kept.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    read: set[int]
    escaped: set[fx.Node]

    def calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        """Each call of a module that was not looked into."""
        for node in self.graph.nodes:
            if node.op == "call_module":
                yield node, self.modules[str(node.target)]

    def outputs(self) -> Iterator[tuple[nn.Module, nn.Module | str]]:
        """For each call of a convolution the norm that alone gets its output; or in words, where that goes instead."""
        called = dict(self.calls())
        for node, conv in called.items():
            if isinstance(conv, (*PLAIN, Foldable)):
                yield conv, self._goes_to(node, conv, called)

    def _goes_to(self, node: fx.Node, conv: nn.Module, called: dict[fx.Node, nn.Module]) -> nn.Module | str:
        if type(conv) not in PLAIN and not isinstance(conv, Foldable):
            return "it is a subclass of a convolution and may compute anything"
        if len(node.args) != 1:
            return "it is not called with its input alone"
        if node in self.escaped:
            return "its output is kept"
        if len(node.users) != 1:
            return f"its output is read in {len(node.users)} places"
        (user,) = node.users
        norm = called.get(user)
        if norm is None or not is_norm(norm):
            what = type(norm).__name__ if norm is not None else getattr(user.target, "__name__", user.target)
            return f"its output goes to {what}, no batch norm module"
        if user.args != (node,) or user.kwargs:
            return f"{user.target}, which reads its output, is not called with that alone"
        return norm

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


def traces_of(model: nn.Module) -> list[Trace]:
    """The model's evaluation-mode traces, one for each choice of omitted arguments; none if one of them fails."""
    if "forward" in vars(model):
        return []
    shadow = shadow_of(model)
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
        kept = {value.node for m in shadow.modules() for value in leaves(list(vars(m).values())) if _stands_in(value)}
        traces.append(Trace(graph, modules, reads.seen, kept))
    return traces


def leaves(value: Any) -> Iterator[Any]:
    """What a value holds in plain tuples, lists, sets and dicts, at any depth; else the value itself."""
    if type(value) is tuple or isinstance(value, (list, set)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


def _stands_in(value: Any) -> bool:
    return issubclass(type(value), fx.Proxy)
