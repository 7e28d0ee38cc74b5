"""`verify`: run two networks on the same inputs and report how far apart they are, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..algebra.convolutions import PLAIN
from ..algebra.norms import is_norm
from ..layers import Foldable, NormPlace
from ..layers.handover import unchecked
from ._outputs import difference
from ._watching import arguments_of
from .table import align
from .tree import evaluation, walk


@dataclasses.dataclass(frozen=True)
class LayerError:
    """How far one layer's output is from its counterpart's, both given the input that `before` gave it."""

    name: str
    layer: str
    error: float
    """Largest absolute difference of the outputs."""
    scale: float
    """Largest absolute value of the output."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found; print it for a table."""

    max_error: float
    """Largest absolute difference of the networks' outputs."""
    scale: float
    """Largest absolute value of the output of the network before."""
    layers: tuple[LayerError, ...]
    """The layers that differ in kind, in the order in which they run."""
    uncompared: tuple[str, ...] = ()
    """Layers that did not run on these inputs, or have no counterpart."""

    @property
    def relative_error(self) -> float:
        """`max_error` divided by `scale`."""
        return self.max_error / self.scale if self.scale else self.max_error

    def ok(self, tolerance: float = 1e-5) -> bool:
        """Are all errors, of the network and of each layer, at most `tolerance` relative to the output's scale?

        NaN is never ok.
        """
        pairs = [(self.max_error, self.scale), *((layer.error, layer.scale) for layer in self.layers)]
        return all(error <= tolerance * max(scale, 1.0) for error, scale in pairs)

    def __str__(self) -> str:
        rows = [("layer", "type", "max error", "max output")]
        rows += [(x.name or "(root)", x.layer, f"{x.error:.1e}", f"{x.scale:.1e}") for x in self.layers]
        rows += [("whole network", "", f"{self.max_error:.1e}", f"{self.scale:.1e}")]
        rows += [(name, "not compared", "", "") for name in self.uncompared]
        return align(rows)


@torch.no_grad()
def verify(before: nn.Module, after: nn.Module, inputs: Any) -> Report:
    """Compare two networks in evaluation mode, as a whole and layer by layer.

    Args:
        before: for example the expanded network.
        after: for example the folded one; its modules have the same qualified names.
        inputs: what the network is called with: a tensor, a tuple of arguments, or a dictionary of keyword
            arguments; on the networks' device, of their dtype.

    Returns:
        A `Report`. Each layer's error is its own: the counterpart gets the input that `before`'s layer got, so errors
        do not add up along the network. A convolution whose norm was absorbed is compared together with that norm.

    Raises:
        UnsupportedError: when the networks' outputs have different structures or shapes, or hold nothing to compare.
            Dataclasses, named tuples, mappings, NumPy arrays and objects with attributes are looked into.

    Example:
        >>> import foldconv
        >>> rich = foldconv.expand(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), "doconv")
        >>> report = foldconv.verify(rich, foldconv.fold(rich), torch.randn(1, 1, 8, 8))
        >>> report.ok(1e-5), [layer.name for layer in report.layers]
        (True, ['0'])
    """
    args, kwargs = arguments_of(inputs)
    with evaluation(before) as ours, evaluation(after) as theirs, unchecked():
        named = dict(theirs.named_modules(remove_duplicate=False)) | dict(walk(theirs))
        watch = _Watch(ours, {name: module for name, module in named.items() if _can_be_called(module)})
        with watch:
            expected = ours(*args, **kwargs)
        received = theirs(*args, **kwargs)
    error, scale = difference(expected, received, "the output")
    return Report(error, scale, tuple(watch.found), tuple(sorted(watch.missing)))


class _Watch:
    """Hooks on `before` that run each counterpart on the same input.

    A convolution whose norm is gone from one of the networks has to be compared behind the norm: it waits until the
    norm of `before`, or what keeps its place, receives that very output.
    """

    def __init__(self, before: nn.Module, theirs: Mapping[str, nn.Module]):
        self.found: list[LayerError] = []
        self.missing: set[str] = set()
        self.waiting: list[tuple[str, Any, Any]] = []
        self.theirs = theirs
        self.watched: dict[nn.Module, str] = {}
        for name, module in walk(before):
            other = theirs.get(name)
            differs = isinstance(module, Foldable) or (isinstance(module, PLAIN) and _changed(module, other))
            if differs or _closes(module, other):
                self.watched.setdefault(module, name)
                if differs:
                    self.missing.add(name)
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        self.handles = [m.register_forward_hook(self._see, with_kwargs=True) for m in self.watched]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self.watched[module]
        if isinstance(module, (Foldable, *PLAIN)):
            other = self.theirs.get(name)
            if other is not None:
                # Now, for what comes next may change input and output in place.
                received = other(*args, **kwargs)
                self.waiting.append((name, output, received))
                self._add(name, module, output, received)
            return
        for i, (conv, produced, received) in enumerate(self.waiting):
            if args and args[0] is produced:
                del self.waiting[i]
                index = max(i for i, found in enumerate(self.found) if found.name == conv)
                found = self.found.pop(index)
                self._add(conv, found.layer, output, self.theirs[name](received))
                self.found.insert(index, self.found.pop())
                return

    def _add(self, name: str, layer: nn.Module | str, expected: Any, received: Any) -> None:
        error, scale = difference(expected, received, f"the output of {name or 'the root'}")
        kind = layer if isinstance(layer, str) else type(layer).__name__
        self.missing.discard(name)
        self.found.append(LayerError(name, kind, error, scale))


def _can_be_called(module: nn.Module) -> bool:
    """Parts of a scripted, traced or exported network are names for tensors only."""
    return not isinstance(module, torch.jit.ScriptModule) and type(module).forward is not nn.Module.forward


def _closes(module: nn.Module, other: nn.Module | None) -> bool:
    """Is this where a norm is in one of the two networks only?"""
    if other is None or other is module:
        return False
    return (is_norm(module) and not is_norm(other)) or (isinstance(module, NormPlace) and is_norm(other))


def _changed(module: nn.Module, other: nn.Module | None) -> bool:
    """Is a plain convolution no longer the same one (a norm was absorbed into it)?"""
    if other is None or not isinstance(other, PLAIN) or other is module:
        return False
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() != theirs.keys() or any(
        x.shape != theirs[key].shape or not torch.equal(x, theirs[key].to(x)) for key, x in ours.items()
    )
