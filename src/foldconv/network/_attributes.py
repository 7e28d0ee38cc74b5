"""Which convolutions and norms a forward uses in another way than calling them, where absorbing a norm would show.

A norm that is absorbed is gone, with all of its attributes; a convolution without a bias then has one; and who sets an
attribute of either (the mode of a norm, the stride of a convolution) changes what it computes from call to call.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from ..algebra.convolutions import PLAIN
from ..algebra.norms import is_norm
from ..layers import Foldable

_KEPT = frozenset(dir(nn.Identity()))


@contextlib.contextmanager
def attributes_used(
    originals: Mapping[nn.Module, nn.Module], running: Callable[[], nn.Module | None] = lambda: None
) -> Iterator[set[nn.Module]]:
    """The modules of which code asks for such attributes or sets any meanwhile, in terms of the caller's own.

    Args:
        originals: the modules that are watched, each with the one that it is a copy of.
        running: the convolution or norm that runs now, which may use its own.
    """
    found: set[nn.Module] = set()
    norms = {id(m) for m in originals if is_norm(m)}
    convs = {id(m): m for m in originals if isinstance(m, (Foldable, *PLAIN))}
    unbiased = {number for number, m in convs.items() if m._parameters.get("bias") is None}
    watched = {id(m): original for m, original in originals.items() if id(m) in norms or id(m) in convs}
    get: Any = nn.Module.__getattribute__
    set_: Any = nn.Module.__setattr__

    # Both are called for what they do themselves, too, and so ask a module for nothing.
    def getattribute(self: nn.Module, name: str) -> Any:
        if (id(self) in norms and name not in _KEPT) or (id(self) in unbiased and name == "bias"):
            who = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
            if who not in ("torch", "foldconv") and running() is not self:
                found.add(watched[id(self)])
        return get(self, name)

    def setattribute(self: nn.Module, name: str, value: Any) -> None:
        if id(self) in watched and running() is not self:
            found.add(watched[id(self)])
        set_(self, name, value)

    nn.Module.__getattribute__ = getattribute  # pyright: ignore[reportAttributeAccessIssue]
    nn.Module.__setattr__ = setattribute
    try:
        yield found
    finally:
        nn.Module.__setattr__ = set_
        if get is object.__getattribute__:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = get
