"""Which norm follows which convolution, proven by tracing where the tensors go (torch.fx), never by name or order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from .algebra.norms import is_norm
from .layers import Foldable
from .layers.foldable import PLAIN


class _Tracer(fx.Tracer):
    """Traces through containers; layers, and containers that cannot be traced, are opaque."""

    def __init__(self, opaque: set[nn.Module]):
        super().__init__()
        self.opaque = opaque
        self.stack: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque or isinstance(m, Foldable) or is_norm(m) or not any(True for _ in m.children())

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        self.stack.append(m)
        result = super().call_module(m, forward, args, kwargs)
        # Left in place when an exception passes: the innermost container is then on top.
        self.stack.pop()
        return result


def trace(model: nn.Module) -> fx.Graph | None:
    """The model's graph of layer calls, with what cannot be traced as opaque nodes; None if the root cannot be.

    Example:
        >>> [node.op for node in trace(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())).nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """
    opaque: set[nn.Module] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            return tracer.trace(model)
        except Exception:
            # Whatever a forward does that symbolic values cannot follow: its module becomes opaque.
            if not tracer.stack or tracer.stack[-1] in opaque:
                return None
            opaque.add(tracer.stack[-1])


def conv_norm_pairs(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Each convolution (plain or foldable) whose only consumer is one norm, with that norm.

    Proven means: in the traced graph the convolution is called once, its output goes to the norm and nowhere else,
    the norm is called once, and neither is used in any other way (its weight read, hooks watching it, registered
    in an opaque part of the model). A model whose own forward cannot be traced has no proven pairs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        >>> list(conv_norm_pairs(net).values())
        [BatchNorm2d(2, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)]
    """
    # Norms without running statistics trace like others; whether they can be absorbed is not a question of data flow.
    if isinstance(model, PLAIN) or is_norm(model) or isinstance(model, Foldable):
        return {}
    graph = trace(model)
    if graph is None:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
    touched = _touched(graph, modules)
    pairs: dict[nn.Module, nn.Module] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        conv = modules[str(node.target)]
        if not isinstance(conv, (*PLAIN, Foldable)) or len(node.users) != 1 or len(node.args) != 1:
            continue
        (user,) = node.users
        if user.op != "call_module" or user.args != (node,) or user.kwargs:
            continue
        norm = modules[str(user.target)]
        once = calls[conv] == calls[norm] == 1 and not {conv, norm} & touched
        if is_norm(norm) and once and not (_hooked(conv) or _hooked(norm)):
            pairs[conv] = norm
    return pairs


def _touched(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[nn.Module]:
    """Modules that the graph uses otherwise than by calling them: read parameters, insides of opaque modules."""
    touched: set[nn.Module] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, _ = str(node.target).rpartition(".")
            touched.add(modules[owner])
        if node.op == "call_module" and not isinstance(modules[str(node.target)], (*PLAIN, Foldable)):
            inner = iter(modules[str(node.target)].modules())
            next(inner)
            touched.update(inner)
    parameters = Counter(id(p) for m in set(modules.values()) for p in m.parameters(recurse=False))
    # A tied weight serves two layers; scaling it for one would change the other.
    for module in set(modules.values()):
        if any(parameters[id(p)] > 1 for p in module.parameters(recurse=False)):
            touched.add(module)
    return touched


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


