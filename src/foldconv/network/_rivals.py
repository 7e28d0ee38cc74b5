"""Modules that nothing calls and that may take the turn of those that are called, when an attribute changes.

No look at a forward shows what it does with another attribute (``self.norms[self.domain]``). What it would call then
stands beside what it calls now; a convolution and a norm that both wait belong together, and do so elsewhere.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..algebra.convolutions import PLAIN
from ..layers import Foldable

_LISTS = (nn.ModuleList, nn.ModuleDict)
_NO_NORMS = (nn.PReLU, nn.Linear, nn.Embedding)


class Rivals:
    """Who may take a turn in a model, of which one knows what is called.

    Args:
        model: any module.
        called: the modules that are called, or may be.
    """

    def __init__(self, model: nn.Module, called: set[nn.Module]):
        self._names = {module: name for name, module in model.named_modules()}
        self._modules = dict(model.named_modules())
        self._idle = {m for m in model.modules() if called.isdisjoint(m.modules())}
        self._homes: dict[nn.Module, list[list[nn.Module]]] = {}
        self._settle(model, [[]])

    def of(self, conv: Any, norm: nn.Module) -> str | None:
        """What may take the turn of one of a pair, by name."""
        channels: Any = getattr(conv, "out_channels", None) or _channels(norm)
        for beside in self._homes.get(norm, []):
            for number, other in enumerate(beside):
                if other in self._idle and _channels(other) == channels:
                    before = next((m for m in beside[:number][::-1] if _is_conv(m) or _channels(m) is not None), None)
                    if not (_is_conv(before) and before in self._idle and before.out_channels == channels):
                        return self._names[other]
        for beside in self._homes.get(conv, []):
            for number, other in enumerate(beside):
                if _is_conv(other) and other in self._idle and other.out_channels == channels:
                    behind = next((m for m in beside[number + 1 :] if _is_conv(m) or _channels(m) is not None), None)
                    if behind is None or behind not in self._idle or _channels(behind) != channels:
                        return self._names[other]
        other = self._other_path(conv, norm, channels)
        return None if other is None else self._names[other]

    def _settle(self, parent: nn.Module, homes: list[list[nn.Module]]) -> None:
        """Note for each module with whom it stands."""
        for child in parent._modules.values():
            if child is None:
                continue
            for home in homes:
                home.append(child)
            self._homes.setdefault(child, []).extend(homes)
            # In a list, or a module without convolutions, it also stands beside what is around that.
            inner = isinstance(child, _LISTS) or not any(isinstance(m, PLAIN) for m in child.modules())
            self._settle(child, [*homes, []] if inner else [[]])

    def _other_path(self, conv: nn.Module, norm: nn.Module, channels: int) -> nn.Module | None:
        """A container that waits beside one through which the output goes to the norm, and could get it instead."""
        ours, theirs = self._names[conv].split("."), self._names[norm].split(".")
        common = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), 0)
        for level in range(common, len(theirs)):
            parent = self._modules[".".join(theirs[:level])]
            if level == len(theirs) - 1 == common and not isinstance(parent, _LISTS):
                continue
            for name, child in parent._modules.items():
                if name != theirs[level] and child in self._idle and _takes(child) == channels:
                    return child
        return None


def _is_conv(module: Any) -> bool:
    return isinstance(module, (*PLAIN, Foldable))


def _channels(module: Any) -> int | None:
    """The channels that a module normalizes, as far as its numbers show."""
    for name in ("num_features", "num_channels"):
        if isinstance(channels := getattr(module, name, None), int):
            return channels
    sizes = {t.numel() for t in (*module._parameters.values(), *module._buffers.values()) if t is not None} - {1}
    if isinstance(module, (*PLAIN, *_NO_NORMS)) or any(True for _ in module.children()) or len(sizes) != 1:
        return None
    return sizes.pop()


def _takes(module: Any) -> int | None:
    """The channels of what a module takes, by the first in it that has a number of them."""
    for inner in module.modules():
        channels = inner.in_channels if _is_conv(inner) else _channels(inner)
        if channels is not None:
            return channels
    return None
