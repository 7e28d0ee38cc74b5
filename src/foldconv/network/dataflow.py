"""`DataFlow`: which norm follows which convolution, shown by where the tensors go, never by name or order.

Evidence comes from tracing (see `_tracing`): every choice of optional arguments, every answer to a question about a
tensor. Where a module cannot be traced but its source shows that it only calls a child, the child's inside is proven
on its own. And it comes from running the model on example inputs (see `_watching`), which sees what no trace can. Only
what holds each time counts, in training mode too where `training` asks for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..algebra.convolutions import PLAIN
from ..algebra.norms import is_norm
from ..errors import UnsupportedError
from ..layers import Foldable
from ..layers.foldable import is_altered, is_watched
from ._classes import asked_for_class
from ._hooks import read_by_hooks
from ._rivals import Rivals
from ._sources import held, only_called, reads_by_name, reads_weights
from ._subclasses import why_not
from ._tracing import Trace, traces_of
from ._watching import Run, other_flags, runs_of
from .tree import evaluation


class DataFlow:
    """Where the tensors of a model go; the model is traced once, here, and left as it is.

    Args:
        model: any module.
        example_inputs: what the model is called with (a tensor, a tuple of arguments, or a dictionary of keyword
            arguments); it then also runs, as a copy.
        training: look at training mode, too: for who changes what trains.
        tolerant: a run in training mode may fail: norms refuse a batch of one, which matters only to who changes norms.

    Attributes:
        calls: how often one run calls each module that nobody looks into.
        read: the modules whose tensors the model's own code reads.
        asked: the modules whose exact class the model's own code asks for.
        asked_as: the modules of which it asks whether they are instances of a class.
        used: the modules of which it asks for attributes, or sets them, such that a norm cannot be absorbed.
        unseen: the modules that are used where nobody can look, each with what hides it.
        tied: the modules with a parameter that others hold too.
        outputs: for each convolution what each look has shown of its output: the norm that alone gets it, or in
            words, where it goes instead.
        traces: all traced runs in evaluation mode, for who follows more than convolutions.
        runs: what running has shown.

    Raises:
        UnsupportedError: when the model fails on `example_inputs`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.ReLU())
        >>> flow = DataFlow(net)
        >>> [(type(conv).__name__, type(norm).__name__) for conv, norm in flow.pairs.items()]
        [('Conv2d', 'BatchNorm2d')]
        >>> flow.why(net[0]), flow.why(net[2])
        ('1 alone reads its output', 'its output goes to ReLU, no batch norm module')
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None, *, training: bool = False, tolerant: bool = False):
        self.calls: Counter[nn.Module] = Counter()
        self.read: set[nn.Module] = set()
        self.asked: set[nn.Module] = set()
        self.asked_as: set[nn.Module] = set()
        self.used: set[nn.Module] = set()
        self.unseen: dict[nn.Module, str] = {}
        self.tied = set(_tied(model))
        self.outputs: dict[nn.Module, list[nn.Module | str]] = {}
        self.traces: list[Trace] = []
        self.runs: list[Run] = []
        self._feeders: dict[nn.Module, set[nn.Module]] = {}
        self._mixed: set[nn.Module] = set()
        self._modes = (False, True) if training else (False,)
        self._root = model
        self._names = {module: name for name, module in model.named_modules()}
        self._opaque: set[nn.Module] = set()
        for module in model.modules():
            self.read |= reads_by_name(module) | read_by_hooks(module)
            for asked, found in zip((self.asked, self.asked_as), asked_for_class(module)):
                asked |= found
        with contextlib.suppress(Exception), evaluation(model) as evaluated:  # by its own `eval`
            theirs = dict(evaluated.named_modules())
            self.used |= {
                m for name, m in model.named_modules() if is_norm(m) and getattr(theirs.get(name), "training", False)
            }
        self._failure: UnsupportedError | None = None
        try:
            self._trace(model)
        except UnsupportedError as error:
            self._failure = error
        self._traced = set(self.outputs)
        if example_inputs is not None and self._failure is None:
            for mode in self._modes:
                with contextlib.suppress(UnsupportedError) if tolerant and mode else contextlib.nullcontext():
                    self._add(runs_of(model, example_inputs, mode))
                for flags in other_flags(model, example_inputs) if model in self._opaque else ():
                    with contextlib.suppress(UnsupportedError):  # a model may have no use for them with these inputs
                        self._add(runs_of(model, example_inputs, mode, **flags))
        seen = {module for run in self.runs for module in run.entered} if self.runs else self.unseen.keys()
        self._rivals = Rivals(model, self.calls.keys() | self.read | seen)

    @functools.cached_property
    def free(self) -> set[nn.Module]:
        """The modules that are called once, by code that can be followed, and used in no other way.

        Raises:
            UnsupportedError: when the model could not be followed at all, since it cannot be copied.
        """
        if self._failure is not None:
            raise self._failure
        return {module for module in self.calls if self.calls[module] == 1 and self._against(module) is None}

    @functools.cached_property
    def pairs(self) -> dict[nn.Module, nn.Module]:
        """Each convolution (plain or foldable) whose only consumer is one norm that has no other input, with that norm.

        Norms without running statistics count like others; whether they can be absorbed is no question of data flow.

        Raises:
            UnsupportedError: when the model could not be followed at all, since it cannot be copied.
        """
        if self._failure is not None:
            raise self._failure
        pairs = {}
        for conv in self.outputs:
            norm = self._paired(conv)
            if isinstance(norm, nn.Module):
                pairs[conv] = norm
        return pairs

    def why(self, conv: nn.Module) -> str:
        """Why a convolution is paired with a norm or is not, in words that go on from its name."""
        if self._failure is not None:
            return str(self._failure)
        norm = self._paired(conv)
        return norm if isinstance(norm, str) else f"{self._name(norm)} alone reads its output"

    def _paired(self, conv: nn.Module) -> nn.Module | str:
        """The norm of a convolution, or why there is none."""
        reason = why_not(conv) if isinstance(conv, PLAIN) and not isinstance(conv, Foldable) else None
        reason = reason or self._against(conv)
        if reason is not None:
            return reason
        unseen = "it is never called" if isinstance(conv, (*PLAIN, Foldable)) else "it is no convolution"
        norm, *others = self.outputs.get(conv, [unseen])
        for seen in (norm, *others):
            if isinstance(seen, str):
                return seen
        if any(other is not norm for other in others):
            return "its output goes to different norms for different arguments"
        assert isinstance(norm, nn.Module)
        reason = self._against(norm)
        if norm in self._mixed or len(self._feeders[norm]) > 1:
            reason = "it is also called with other inputs"
        if reason is None and (rival := self._rivals.of(conv, norm)) is not None:
            reason = f"{rival} stands beside it and is called by nothing, so it may take its turn"
        return (
            norm
            if reason is None
            else f"{self._name(norm)} alone reads its output; but of {self._name(norm)}, {reason}"
        )

    def _against(self, module: nn.Module) -> str | None:
        """Why nobody may change what the module computes."""
        if module in self.read:
            return "the model reads its tensors outside of it"
        if module in self.asked or module in self.asked_as:
            return "the model asks for its class"
        if module in self.used:
            what = "asks for its attributes" if is_norm(module) else "asks whether it has a bias"
            return f"the model {what}, or sets one such as its mode"
        if module in self.tied:
            return "another module holds a parameter of it too"
        if is_altered(module):
            return "it has hooks, or a forward of its own"
        if module in self.unseen and not any(module in run.calls for run in self.runs):
            return "it is not called on example_inputs" if self.runs else self.unseen[module]
        return None

    def _name(self, module: nn.Module) -> str:
        return self._names.get(module, type(module).__name__) or "the root"

    def _take(self, outputs: list[tuple[nn.Module, nn.Module | str]], counts: Mapping[nn.Module, int]) -> None:
        """Add what one look has shown: where each call of a convolution leads, and how often each module is called."""
        fed = Counter(norm for _, norm in outputs if isinstance(norm, nn.Module))
        for conv, norm in outputs:
            self.outputs.setdefault(conv, []).append(norm)
            if isinstance(norm, nn.Module):
                self._feeders.setdefault(norm, set()).add(conv)
        self._mixed |= {module for module, count in counts.items() if is_norm(module) and fed[module] != count}

    # ------------------------------------------------------------------ evidence by running

    def _add(self, runs: list[Run]) -> None:
        """Add what runs have shown; who called what a trace could not follow is seen by them."""
        self.runs += runs
        for run in runs:
            self.read |= run.read
            self.used |= run.used
            self._take([(conv, to) for conv, seen in run.outputs.items() for to in seen], run.calls)
            for conv, by in run.asked.items():
                if conv not in self._traced:
                    self.outputs[conv].append(f"{self._name(by)}, through which its output goes, asks for sizes")
            for module, count in run.calls.items():
                # Runs and traces count the same calls, unless nobody could follow them.
                self.calls[module] = max(self.calls[module], count)

    # ------------------------------------------------------------------ evidence by tracing

    def _trace(self, model: nn.Module, caller: str = "nobody that can be seen") -> None:
        """Add what tracing `model` alone shows, and each module in it that can only be traced alone."""
        if isinstance(model, (*PLAIN, Foldable)) or is_norm(model):
            self.unseen[model] = f"it is called by {caller}"
            return
        if model in self._opaque:
            return
        self._opaque.add(model)
        by_mode = (
            [] if is_watched(model) and model is not self._root else [traces_of(model, mode) for mode in self._modes]
        )
        if not by_mode or not all(by_mode):
            self._look_inside(model)
            return
        self.traces += by_mode[0]
        called: Counter[nn.Module] = Counter()
        for trace in (trace for traces in by_mode for trace in traces):
            self.read |= trace.read_from()
            self.used |= trace.used
            counts = Counter(module for _, module in trace.calls())
            self._take(list(trace.outputs()), counts)
            # Each trace tells of another call of the model, so the larger count is the model's.
            called |= counts
        self.calls += called
        for module in called:
            if not isinstance(module, (*PLAIN, Foldable)) and not is_norm(module) and held(list(vars(module).values())):
                self._trace(module, "")

    def _look_inside(self, opaque: nn.Module) -> None:
        """An opaque module may use whatever it holds in any way, except children that its source only calls."""
        held_here = held(list(vars(opaque).values()))
        self.read |= reads_weights(opaque)
        sealed, who = only_called(opaque), f"{self._name(opaque)} ({type(opaque).__name__}), which cannot be traced"
        for module in held_here:
            if module in sealed:
                self._trace(module, who)
            else:
                self.unseen.update(dict.fromkeys(module.modules(), f"{who}, may use it in any way"))


def _tied(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with a parameter that others hold too; scaling it for one would change or untie the other."""
    parameters = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for module in model.modules():
        if any(parameters[id(p)] > 1 for p in module._parameters.values() if p is not None):
            yield module
