"""One model traced by torch.fx: the graph of its forward, as far as stand-ins for tensors can go.

Symbolic tracing runs the forward once with stand-ins for tensors. It is a proof only where the forward cannot ask
a stand-in what it is. A question of its truth (``if x.shape[-1] % 8``) that the traced model itself asks is answered
both ways, each on a trace of its own, and what an answer leads to an explicit ``raise`` is no use of anything. Other
questions (its length, whether it is a tensor) are refused, and so are all of a module inside, which becomes opaque.
Two questions cannot be refused: ``x is None`` and ``type(x)`` get the answer for some tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import inspect
import itertools
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from ..algebra.convolutions import PLAIN
from ..algebra.norms import is_norm
from ..layers import Foldable
from ..layers.foldable import is_watched
from ._attributes import attributes_used
from ._surroundings import put_back
from .tree import shadow_of, uncompiled, unwrapped

ABOUT = ("dtype", "device", "shape", "ndim", "is_cuda", "requires_grad", "layout")
HARMLESS = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_contiguous}
HARMLESS |= {getattr(Tensor, name).__get__ for name in ABOUT}
"""Questions about a tensor that are no use of its values."""
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""What passes on its input in evaluation mode."""

_MAY_ASK = ("torch.fx", "torch.nn.parameter", "torch.nn.modules.module", "torch.utils.checkpoint", __name__)


_GIVE_TENSORS = (
    *(nn.Linear, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.GroupNorm, nn.LayerNorm, nn.Upsample),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d),
)
_OF_TENSORS = (operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, torch.add, torch.mul, torch.cat)
_OF_TENSORS += (F.relu, F.silu, F.gelu, F.pad, F.interpolate, F.adaptive_avg_pool2d, torch.relu, torch.sigmoid)
_METHODS_OF_TENSORS = ("mean", "view", "reshape", "flatten", "contiguous", "relu", "sigmoid", "permute", "expand")


class _Silent:
    """Asked for its class by a forward, or for a member that tensors do not have, it gives no answer."""

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleVariableOverride]
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_MAY_ASK):
            return type(self)
        if self.tracer.is_tensor(self.node):  # pyright: ignore[reportAttributeAccessIssue]
            return Tensor
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

    def __init__(self, answers: list[bool]):
        super().__init__()
        self.answers = answers
        self.asked = 0
        self.depth = 0
        self.unfinished: set[fx.Node] = set()
        self.tensors: dict[fx.Node, bool] = {}

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The next of the given answers; past them True."""
        if self.depth:
            raise TraceError("a module inside asks for the truth of a value")
        if self.asked == _MOST_QUESTIONS:
            raise TraceError("the forward goes on asking for the truth of values")
        if self.asked == len(self.answers):
            self.answers.append(True)
        self.asked += 1
        return self.answers[self.asked - 1]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def is_tensor(self, node: fx.Node) -> bool:
        """Is the value a tensor for certain: what a layer of torch's gives, or a sum or activation of such?"""
        if node not in self.tensors:
            self.tensors[node] = self._gives_a_tensor(node)
        return self.tensors[node]

    def _gives_a_tensor(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            pooled = isinstance(module, nn.MaxPool2d) and not module.return_indices
            return pooled or is_norm(module) or isinstance(module, (*PLAIN, Foldable)) or type(module) in _GIVE_TENSORS
        inputs = node.all_input_nodes
        if node.op == "call_method" or node.target is operator.getitem:  # sizes may be other values of the forward's
            inputs = inputs[:1]
            known = node.target in (*_METHODS_OF_TENSORS, operator.getitem)
        else:
            known = node.op == "call_function" and node.target in _OF_TENSORS
        return known and bool(inputs) and all(map(self.is_tensor, inputs))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A hook on a container may see, keep and change anything that passes.
        norm = is_norm(m) or isinstance(m, _BatchNorm)
        return isinstance(m, Foldable) or norm or is_watched(m) or not any(True for _ in m.children())

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if (inner := unwrapped(m)) is not m and not is_watched(m):
            return inner(*args, **kwargs)
        self.depth += 1
        before = len(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            # Whatever a forward does that stand-ins cannot follow. What it used before is used, but calls are not
            # counted: it is looked into on its own.
            self.unfinished.update(list(self.graph.nodes)[before:])
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        finally:
            self.depth -= 1


class _Reads(TorchFunctionMode):
    """Notes every tensor that a torch function receives as itself, not as a stand-in; by the ids of the originals."""

    def __init__(self, originals: dict[int, int]) -> None:
        super().__init__()
        self.originals = originals
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in HARMLESS:
            found = (id(value) for value in leaves((args, kwargs)) if isinstance(value, Tensor))
            self.seen |= {self.originals.get(own, own) for own in found}
        return func(*args, **kwargs or {})


@dataclasses.dataclass
class Trace:
    """One traced run: the graph, by whose names `modules` are found, and what the graph does not show.

    `read` holds the ids of tensors that torch functions met as themselves, `escaped` the nodes whose values were kept,
    `unfinished` those of modules that could not be followed to their end, `used` the modules of which attributes are
    asked for, or set, such that a norm cannot be absorbed.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    read: set[int]
    escaped: set[fx.Node]
    unfinished: set[fx.Node]
    training: bool
    used: set[nn.Module]

    def calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        """Each call of a module that was not looked into."""
        for node in self.graph.nodes:
            if node.op == "call_module" and node not in self.unfinished:
                yield node, self.modules[str(node.target)]

    def outputs(self) -> Iterator[tuple[nn.Module, nn.Module | str]]:
        """For each call of a convolution the norm that alone gets its output; or in words, where that goes instead."""
        called = dict(self.calls())
        for node, conv in called.items():
            if isinstance(conv, (*PLAIN, Foldable)):
                yield conv, self._goes_to(node, called)

    def _goes_to(self, node: fx.Node, called: dict[fx.Node, nn.Module]) -> nn.Module | str:
        if len(node.args) != 1:
            return "it is not called with its input alone"
        if node in self.escaped:
            return "its output is kept"
        while True:
            if len(node.users) != 1:
                return f"its output is read in {len(node.users)} places"
            (user,) = node.users
            norm = called.get(user)
            if not self._passes_on(norm) or user.args != (node,) or user.kwargs:
                break
            node = user
        if norm is None or not is_norm(norm):
            if isinstance(norm, _BatchNorm) and parametrize.is_parametrized(norm):
                return f"its output goes to {user.target}, a norm with a computed weight; remove the parametrization"
            what = type(norm).__name__ if norm is not None else getattr(user.target, "__name__", user.target)
            return f"its output goes to {what}, no batch norm module"
        if user.args != (node,) or user.kwargs:
            return f"{user.target}, which reads its output, is not called with that alone"
        return norm

    def _passes_on(self, module: nn.Module | None) -> bool:
        """Is the module's output its input?"""
        kinds = (nn.Identity,) if self.training else (nn.Identity, *DROPOUTS)
        return type(module) in kinds and not is_watched(module) and "forward" not in vars(module)  # pyright: ignore

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
    return node.target is getattr and node.args[1] in ABOUT


def traces_of(model: nn.Module, training: bool = False) -> list[Trace]:
    """The model's traces in one mode, for each choice of omitted arguments and each answer; none if one of them fails.

    Arguments that are True or False by default are traced with both, others omitted and given; all of it with gradients
    and without.
    """
    if "forward" in vars(model):
        return []
    shadow, originals = shadow_of(model, training)
    traces: list[Trace] = []
    for grad_mode in (without_gradients(training), torch.enable_grad):
        with torch.inference_mode(False), grad_mode(), put_back(model):
            found = _traces_of(model, shadow, originals, training)
        if not found:
            return []
        traces += found
    return traces


def without_gradients(training: bool) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """How a model runs without gradients: in evaluation mode nothing is recorded at all."""
    return torch.no_grad if training else torch.inference_mode


def _traces_of(model: nn.Module, shadow: nn.Module, originals: dict[int, int], training: bool) -> list[Trace]:
    try:
        parameters = inspect.signature(type(model).forward).parameters.values()
    except ValueError:
        return []
    optional = [p for p in parameters if p.default is not p.empty]
    # None stands for a value that is given, which `concrete_args` do not hold.
    choices = [[True, False] if isinstance(p.default, bool) else [p, None] for p in optional]
    if len(optional) > 6:
        return []
    modules = dict(model.named_modules(remove_duplicate=False))
    theirs = dict(zip(shadow.modules(), model.modules()))
    traces: list[Trace] = []
    for chosen in itertools.product(*choices):
        given = {
            p.name: value.default if isinstance(value, inspect.Parameter) else value
            for p, value in zip(optional, chosen)
            if value is not None
        }
        ways: list[list[bool]] = [[]]
        while ways:
            answers = ways.pop()
            known = len(answers)
            try:
                with (
                    uncompiled(),
                    _Reads(originals) as reads,
                    attributes_used(theirs) as used,
                    warnings.catch_warnings(),
                ):
                    warnings.simplefilter("ignore")  # fx warns where it cannot insert a check of an omitted argument
                    tracer = _Tracer(answers)
                    graph = tracer.trace(shadow, given or None)
            except Exception as error:
                if not _is_raised(error):
                    return []
                graph = None
            ways += [[*answers[:n], False] for n in range(known, len(answers))]
            kept = {x.node for m in shadow.modules() for x in leaves(list(vars(m).values())) if _stands_in(x)}
            if graph is not None:
                traces.append(Trace(graph, modules, reads.seen, kept, tracer.unfinished, training, used))
            if len(traces) + len(ways) > _MOST:
                return []
    return traces


_MOST = 64
"""Traces of one model; who has more ways through it is not followed."""
_MOST_QUESTIONS = 16
"""Questions in one trace: a loop asks for ever (``while x.sum() < 10``)."""


def _is_raised(error: Exception) -> bool:
    """Did a ``raise`` or ``assert`` in the model's own source end the forward, or what stand-ins cannot do?"""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_globals.get("__name__", "").startswith(("torch.", __name__)):
        return False
    code = dis.get_instructions(trace.tb_frame.f_code)
    return any(i.offset == trace.tb_lasti and i.opname == "RAISE_VARARGS" for i in code)


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
