"""One run of a model on example inputs: which modules get each convolution's output, and who reads whose tensors.

The model runs as a copy that shares no tensor with the caller's. A function mode sees every torch function, hooks say
which module called it. What a run does not show by a call it shows by what is left: an output that outlives the call
was returned or kept somewhere.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import inspect
import itertools
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..algebra.convolutions import PLAIN
from ..algebra.norms import is_norm
from ..errors import UnsupportedError
from ..layers import Foldable
from ..layers.foldable import is_watched
from ..layers.handover import unchecked
from ._attributes import attributes_used
from ._sizes import OF_SHAPE, Asked
from ._surroundings import put_back
from ._tracing import DROPOUTS, HARMLESS, without_gradients
from .tree import shadow_of, uncompiled

_MOST_FLAGS = 3


@dataclasses.dataclass
class Run:
    """What one run has shown, in terms of the caller's modules.

    Attributes:
        outputs: for each convolution, call by call, the norm that alone got its output; or in words, where it went.
        calls: how often each convolution and norm was called.
        read: modules whose tensors somebody else read.
        entered: all modules that were called.
        asked: convolutions between which and their norm somebody asks for sizes, with who.
        used: modules of which attributes were asked for, or set, such that a norm cannot be absorbed.
    """

    outputs: dict[nn.Module, list[nn.Module | str]]
    calls: dict[nn.Module, int]
    read: set[nn.Module]
    entered: set[nn.Module]
    asked: dict[nn.Module, nn.Module]
    used: set[nn.Module]


@dataclasses.dataclass
class _Call:
    """One call of a convolution: the norms that got its output as their only input, and any other use, in words."""

    conv: nn.Module
    output: weakref.ref[Tensor] | None
    norms: list[nn.Module] = dataclasses.field(default_factory=list)
    elsewhere: str | None = None
    stack: tuple[nn.Module, ...] = ()
    through: set[nn.Module] = dataclasses.field(default_factory=set)

    def pass_through(self, stack: list[nn.Module]) -> None:
        """The output goes on where these run: through all that do not run both times, and the last that does."""
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], zip(self.stack, stack)))
        self.through.update(self.stack[max(common - 1, 0) :], stack[max(common - 1, 0) :])

    def lives(self) -> bool:
        """Does anybody still hold the output?"""
        return self.output is not None and self.output() is not None


class _Watch(TorchFunctionMode):
    """Follows the outputs of convolutions through a model's calls and torch's functions."""

    def __init__(self, model: nn.Module, training: bool, sizes: bool):
        super().__init__()
        self.training, self.sizes = training, sizes
        self.names = {module: name or "the root" for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.asked = Asked(self.stack)
        self.packing = False
        self.entered: set[nn.Module] = set()
        self.calls: list[_Call] = []
        self.by_output: dict[int, _Call] = {}
        self.fed: dict[nn.Module, list[nn.Module | None]] = {}
        self.read: set[nn.Module] = set()
        self.owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self.owners.setdefault(id(tensor), []).append(module)
        # The user's hooks do not run: they may change what is not the copy's. What they would see is used elsewhere.
        self.hooked = {module for module in model.modules() if is_watched(module)}
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            vars(module).pop("_output_capturing_hooks_installed", None)  # transformers puts its own there again
            module.register_forward_pre_hook(self.enter, with_kwargs=True)
            module.register_forward_hook(self.leave, with_kwargs=True)

    def call_of(self, value: Any) -> _Call | None:
        """The convolution's call whose output a value is."""
        found = self.by_output.get(id(value))
        return found if found is not None and found.output is not None and found.output() is value else None

    def inside(self) -> nn.Module | None:
        """The outermost convolution or norm that runs now; what happens in it is its own affair."""
        return next((m for m in self.stack if isinstance(m, (*PLAIN, Foldable)) or is_norm(m)), None)

    def passes_on(self) -> bool:
        """Is the module that runs now a dropout that does nothing?"""
        return not self.training and bool(self.stack) and type(self.stack[-1]) in DROPOUTS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in HARMLESS:
            self.see(func, args, kwargs)
        result = func(*args, **kwargs or {})
        if func is Tensor.__len__:
            self.asked.note_length()
        return self.asked.of(result) if self.sizes and func in OF_SHAPE else result

    def see(self, func: Any, args: Any, kwargs: Any) -> None:
        """A function of torch's, or an operation that perhaps none has begun (a script's, an extension's)."""
        inside = self.inside()
        for value in pytree.tree_leaves((args, kwargs)) if not self.passes_on() else ():
            if isinstance(value, Tensor) and not self.packing:
                self.meet(value, func, inside)

    def meet(self, value: Tensor, func: Any, inside: nn.Module | None) -> None:
        """A torch function gets a tensor."""
        call = self.call_of(value)
        if call is not None and inside is not call.conv and inside not in call.norms:
            self.use(call, f"{getattr(func, '__name__', func)} in {self.here()}")
        owners = self.owners.get(id(value), [])
        if not any(owner in self.stack for owner in owners):  # of several who share it, each may read it
            self.read.update(owners)

    def use(self, call: _Call, what: str) -> None:
        """The output of a call is used by somebody who is no norm."""
        call.elsewhere = call.elsewhere or what

    def here(self) -> str:
        """The module that runs now."""
        return self.names.get(self.stack[-1], type(self.stack[-1]).__name__) if self.stack else "the root"

    def pack(self, tensor: Tensor) -> Tensor:
        """What autograd saves, which is no use of it: the values, so that no tensor of the forward's is kept alive."""
        self.packing = True
        try:
            return tensor.data
        finally:
            self.packing = False

    def pass_hooks(self, module: nn.Module, values: Any) -> None:
        """A module that others watch gets or gives values."""
        if module in self.hooked:
            for call in map(self.call_of, pytree.tree_leaves(values)):
                if call is not None:
                    self.use(call, f"{self.names[module]}, which has hooks")

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is called."""
        if self.inside() is None:
            self.pass_hooks(module, (args, kwargs))
            if is_norm(module):
                call = self.call_of(args[0]) if len(args) == 1 and not kwargs else None
                self.fed.setdefault(module, []).append(None if call is None else call.conv)
                if call is not None:
                    call.norms.append(module)
                    call.pass_through(self.stack)
        self.stack.append(module)
        self.entered.add(module)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module returns."""
        while self.stack and self.stack.pop() is not module:  # who raised in between has not left
            pass
        if self.inside() is not None:
            return
        if isinstance(module, (*PLAIN, Foldable)):
            self.calls.append(call := _Call(module, None, stack=tuple(self.stack)))
            if len(args) != 1 or kwargs:
                self.use(call, "a call with more than its input")
            elif not isinstance(output, Tensor) or self.call_of(output) is not None:
                self.use(call, "an output that is no tensor of its own")
            else:
                call.output = weakref.ref(output)
                self.by_output[id(output)] = call
        self.pass_hooks(module, output)

    def destination(self, call: _Call) -> nn.Module | str:
        """The norm that alone got the output of a call; or in words, what else."""
        if call.elsewhere is not None:
            return f"its output is read by {call.elsewhere}"
        if len(call.norms) != 1:
            return f"its output goes to {len(call.norms) or 'no'} batch norm module{'s' * (len(call.norms) != 1)}"
        return call.norms[0]


class _Operations(TorchDispatchMode):
    """Shows a watch every operation, whoever begins it."""

    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.see(func, args, kwargs)
        return func(*args, **kwargs or {})


def runs_of(model: nn.Module, example_inputs: Any, training: bool, **flags: bool) -> list[Run]:
    """Run copies of the model in one mode and watch, without gradients and with; `flags` are keyword arguments besides.

    Raises:
        UnsupportedError: when the model cannot be copied, or fails on these inputs both without gradients and with.
    """
    runs, failures = [], []
    # The first of each row that succeeds. Who must not run inside inference mode may run without gradients, or wants
    # common integers; who leaves torch cannot do so with an input that needs a gradient.
    for row in (
        [(without_gradients(training), {}), (torch.no_grad, {}), (torch.no_grad, {"sizes": False})],
        [(torch.enable_grad, {"to_inputs": True}), (torch.enable_grad, {})],
    ):
        for grad_mode, how in row:
            try:
                runs.append(_run_of(model, example_inputs, training, grad_mode, flags, **how))
                break
            except UnsupportedError as error:
                failures.append(error)
    if not runs:
        raise failures[0]
    return runs


def _run_of(
    model: nn.Module,
    example_inputs: Any,
    training: bool,
    grad_mode: Any,
    flags: dict[str, bool],
    to_inputs: bool = False,
    sizes: bool = True,
) -> Run:
    """One run; `to_inputs` asks for the gradients of the inputs, too, `sizes` watches who asks for them."""
    shadow = shadow_of(model, training)[0]
    theirs = dict(zip(shadow.modules(), model.modules()))
    watch = _Watch(shadow, training, sizes)
    # Computed tensors refuse to be copied.
    computed = {id(v): _fresh(v, to_inputs) for v in pytree.tree_leaves(example_inputs) if isinstance(v, Tensor)}
    args, kwargs = arguments_of(copy.deepcopy(example_inputs, computed))
    kwargs |= flags
    try:
        with (
            torch.inference_mode(False),
            grad_mode(),
            torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda tensor: tensor),
            put_back(shadow),
            uncompiled(),
            unchecked(),
            warnings.catch_warnings(),
            attributes_used(theirs, watch.inside) as used,
            _Operations(watch),
            watch,
        ):
            warnings.simplefilter("ignore")
            result = shadow(*args, **kwargs)
    except Exception as error:
        mode = "training" if training else "evaluation"
        raise UnsupportedError(
            f"example_inputs: {type(model).__name__} fails on them in {mode} mode ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); give what its forward takes, in batches of at least two"
        ) from error
    del args, kwargs, computed
    for value in pytree.tree_leaves(result):
        if isinstance(value, Tensor) and value.grad_fn is not None:
            with contextlib.suppress(RuntimeError):  # views stay as they are
                value.detach_()  # what would compute a part again (checkpoints) keeps what it was given until then
    if any(call.lives() for call in watch.calls):
        gc.collect()  # reference cycles of the forward's own keep nothing
    for call in watch.calls:
        if call.lives():
            watch.use(call, "whoever keeps it or gets the model's output")
    del result
    outputs: dict[nn.Module, list[nn.Module | str]] = {}
    calls: dict[nn.Module, int] = {theirs[norm]: len(fed) for norm, fed in watch.fed.items() if norm in theirs}
    for call in watch.calls:
        if call.conv in theirs:
            to = watch.destination(call)
            outputs.setdefault(theirs[call.conv], []).append(theirs[to] if isinstance(to, nn.Module) else to)
            calls[theirs[call.conv]] = calls.get(theirs[call.conv], 0) + 1
    read, entered = ({theirs[m] for m in found if m in theirs} for found in (watch.read, watch.entered))
    asked = {theirs[c.conv]: theirs[m] for c in watch.calls for m in c.through & watch.asked.by if c.conv in theirs}
    return Run(outputs, calls, read, entered, asked, used)


def _fresh(tensor: Tensor, with_gradient: bool) -> Tensor:
    """A copy; with a gradient one that something computed, for leaves cannot be written to."""
    with torch.inference_mode(False), torch.enable_grad():
        copied = tensor.detach().clone()
        numbers = copied.is_floating_point() or copied.is_complex()
        return copied.requires_grad_().clone() if with_gradient and numbers else copied


def other_flags(model: nn.Module, example_inputs: Any) -> list[dict[str, bool]]:
    """What else a model may be called with: each yes-or-no argument that the inputs leave out, the other way."""
    args, kwargs = arguments_of(example_inputs)
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    left = [p for p in parameters[len(args) :] if isinstance(p.default, bool) and p.name not in kwargs]
    return [{p.name: not p.default} for p in left if p.kind is not p.POSITIONAL_ONLY][:_MOST_FLAGS]


def arguments_of(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """What a model is called with: a tensor, a tuple of arguments, or a dictionary of keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})
