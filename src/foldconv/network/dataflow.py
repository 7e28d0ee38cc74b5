"""`DataFlow`: which norm follows which convolution, proven by where the tensors go, never by name or order.

Evidence comes from tracing (see `_tracing`). Every choice of optional arguments given and omitted is traced, and only
what holds each time counts. Where a module cannot be traced but its source shows that it only calls a child, the
child's inside is proven on its own.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator

from torch import nn

from ..algebra.convolutions import PLAIN
from ..algebra.norms import is_norm
from ..errors import UnsupportedError
from ..layers import Foldable
from ..layers.foldable import is_watched
from ._sources import held, only_called
from ._tracing import Trace, traces_of


class DataFlow:
    """Where the tensors of a model go; the model is traced once, here, and left as it is.

    Attributes:
        calls: how often one run calls each module that nobody looks into.
        read: the modules whose tensors the model's own code reads.
        unseen: the modules that are used where nobody can look, each with what hides it.
        tied: the modules with a parameter that others hold too.
        outputs: for each convolution what each look has shown of its output: the norm that alone gets it, or in
            words, where it goes instead.
        traces: all traced runs, for who follows more than convolutions.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.ReLU())
        >>> flow = DataFlow(net)
        >>> [(type(conv).__name__, type(norm).__name__) for conv, norm in flow.pairs.items()]
        [('Conv2d', 'BatchNorm2d')]
        >>> flow.why(net[0]), flow.why(net[2])
        ('1 alone reads its output', 'its output goes to ReLU, no batch norm module')
    """

    def __init__(self, model: nn.Module):
        self.calls: Counter[nn.Module] = Counter()
        self.read: set[nn.Module] = set()
        self.unseen: dict[nn.Module, str] = {}
        self.tied = set(_tied(model))
        self.outputs: dict[nn.Module, list[nn.Module | str]] = {}
        self.traces: list[Trace] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._opaque: set[nn.Module] = set()
        self._failure: UnsupportedError | None = None
        try:
            self._trace(model)
        except UnsupportedError as error:
            self._failure = error

    @functools.cached_property
    def free(self) -> set[nn.Module]:
        """The modules that are called once, by code that can be followed, and used in no other way.

        Raises:
            UnsupportedError: when the model could not be followed at all, since it cannot be copied.
        """
        if self._failure is not None:
            raise self._failure
        return {module for module in self.calls if self._against(module) is None}

    @functools.cached_property
    def pairs(self) -> dict[nn.Module, nn.Module]:
        """Each convolution (plain or foldable) whose only consumer is one norm, with that norm.

        Norms without running statistics count like others; whether they can be absorbed is no question of data flow.

        Raises:
            UnsupportedError: when the model could not be followed at all, since it cannot be copied.
        """
        free, pairs = self.free, {}
        for conv, (norm, *others) in self.outputs.items():
            if isinstance(norm, nn.Module) and {conv, norm} <= free and all(other is norm for other in others):
                pairs[conv] = norm
        return pairs

    def why(self, conv: nn.Module) -> str:
        """Why a convolution is paired with a norm or is not, in words that go on from its name."""
        if self._failure is not None:
            return str(self._failure)
        reason = self._against(conv)
        if reason is not None:
            return reason
        norms: set[nn.Module] = set()
        for seen in self.outputs.get(conv, ["it is no convolution"]):
            if isinstance(seen, str):
                return seen
            norms.add(seen)
        if len(norms) > 1:
            return "its output goes to different norms for different arguments"
        (norm,) = norms
        name, reason = self._name(norm), self._against(norm)
        return f"{name} alone reads its output" + (f"; but of {name}, {reason}" if reason else "")

    def _against(self, module: nn.Module) -> str | None:
        """Why the module is not `free`."""
        if module in self.unseen:
            return self.unseen[module]
        if module in self.read:
            return "the model reads its tensors outside of it"
        if module in self.tied:
            return "another module holds a parameter of it too"
        if self.calls[module] != 1:
            return f"it is called {self.calls[module]} times"
        if is_altered(module):
            return "it has hooks, or a forward of its own"
        return None

    def _name(self, module: nn.Module) -> str:
        return self._names.get(module, type(module).__name__) or "the root"

    # ------------------------------------------------------------------ evidence by tracing

    def _trace(self, model: nn.Module, caller: str = "nobody that can be seen") -> None:
        """Add what tracing `model` alone shows, and each module in it that can only be traced alone."""
        if isinstance(model, (*PLAIN, Foldable)) or is_norm(model):
            self.unseen[model] = f"it is called by {caller}"
            return
        traces = traces_of(model)
        if not traces:
            self._look_inside(model)
            return
        self.traces += traces
        called: Counter[nn.Module] = Counter()
        outputs: dict[nn.Module, list[nn.Module | str]] = {}
        for trace in traces:
            self.read |= trace.read_from()
            # Each trace tells of another call of the model, so the larger count is the model's.
            called |= Counter(module for _, module in trace.calls())
            for conv, output in trace.outputs():
                outputs.setdefault(conv, []).append(output)
        for conv, seen in outputs.items():
            missed = ["it is called for some choices of arguments only"] * (len(seen) < len(traces))
            self.outputs.setdefault(conv, []).extend([*seen, *missed])
        self.calls += called
        for module in called:
            if not isinstance(module, (*PLAIN, Foldable)) and not is_norm(module):
                self._look_inside(module)

    def _look_inside(self, opaque: nn.Module) -> None:
        """An opaque module may use whatever it holds in any way, except children that its source only calls."""
        held_here = held(list(vars(opaque).values()))
        if not held_here or opaque in self._opaque:
            return
        self._opaque.add(opaque)
        sealed, who = only_called(opaque), f"{self._name(opaque)} ({type(opaque).__name__}), which cannot be traced"
        for module in held_here:
            if module in sealed:
                self._trace(module, who)
            else:
                self.unseen.update(dict.fromkeys(module.modules(), f"{who}, may use it in any way"))


def is_altered(module: nn.Module) -> bool:
    """Does anything watch the module, or stand for its forward?"""
    return is_watched(module) or "forward" in vars(module)


def _tied(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with a parameter that others hold too; scaling it for one would change or untie the other."""
    parameters = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for module in model.modules():
        if any(parameters[id(p)] > 1 for p in module._parameters.values() if p is not None):
            yield module
