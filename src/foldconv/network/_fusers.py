"""Other people's blocks that fuse themselves read ``weight`` as the kernel: those that hold foldable layers fold first.

timm's ``reparameterize_model``, and the loops of many repositories, call whichever of three methods a module has. A
method of that name that takes no argument is such a one; on each block that holds foldable layers, an attribute stands
before it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..layers import Foldable, NormPlace

_NAMES = ("fuse", "reparameterize", "switch_to_deploy")


def guard_fusers(model: nn.Module, fold: Callable[..., Any]) -> nn.Module:
    """The model itself, with attributes that call `fold` where foldable layers are, and without where none are left."""
    for module in model.modules():
        for name in _NAMES:
            if isinstance(module, (Foldable, NormPlace)) or not _fuses(type(module), name):
                continue
            ours = getattr(vars(module).get(name), "func", None) is _fold_and_fuse
            if any(isinstance(inner, Foldable) for inner in module.modules()):
                vars(module).setdefault(name, functools.partial(_fold_and_fuse, module, name, fold))
            elif ours:
                del vars(module)[name]
    return model


def _fold_and_fuse(block: nn.Module, name: str, fold: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    fold(block, inplace=True)  # its convolutions and norms are ordinary again, and this attribute is gone
    return getattr(block, name)(*args, **kwargs)


@functools.cache
def _fuses(cls: type, name: str) -> bool:
    method = getattr(cls, name, None)
    if not inspect.isfunction(method):
        return False
    _, *arguments = inspect.signature(method).parameters.values()
    return all(each.default is not each.empty or each.kind is each.VAR_KEYWORD for each in arguments)
