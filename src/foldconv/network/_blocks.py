"""Other people's blocks in a network: folded where `foldconv.blocks` knows how, put back when something else fails."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from torch import nn

from ..blocks import folded_block
from ..errors import FoldMismatchError, UnsupportedError
from ..layers import Foldable
from .tree import carry_over, rebound, replace_modules

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def blocks_folded(model: nn.Module, *, strict: bool, check: bool) -> Iterator[nn.Module]:
    """The model with its blocks folded; on an error in the context every block is put back.

    Args:
        model: changed in place; the root is another module where the root itself is a block.
        strict: raise for a block that cannot be folded, instead of leaving it with a word in the log.
        check: as in `folded_block`.
    """
    done: list[dict[nn.Module, nn.Module]] = []
    left: dict[nn.Module, str] = {}
    try:
        # What stays of a folded block may hold others.
        while found := _find(model, strict, check, left):
            done.append(found)
            for old, new in found.items():
                _carry_over(old, new)
            try:
                model = replace_modules(model, found)
            except UnsupportedError as error:
                if strict:
                    raise
                left |= dict.fromkeys(_undone(done.pop()).values(), str(error))
        yield model
    except BaseException:
        for found in reversed(done):
            model = replace_modules(model, _undone(found))
        raise
    for reason in dict.fromkeys(left.values()):
        _LOG.warning("fold leaves a block as it is: %s", reason)


def _undone(found: dict[nn.Module, nn.Module]) -> dict[nn.Module, nn.Module]:
    """The blocks, by what took their place, with the hooks bound to them again."""
    return {new: _carry_over(new, old) for old, new in found.items()}


def _find(model: nn.Module, strict: bool, check: bool, left: dict[nn.Module, str]) -> dict[nn.Module, nn.Module]:
    """Each block, outermost first, with what takes its place."""
    found: dict[nn.Module, nn.Module] = {}
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop(0)
        if module in found or isinstance(module, Foldable):
            continue
        if module not in left:
            try:
                new = folded_block(module, check)
            except (UnsupportedError, FoldMismatchError) as error:
                reason = f"{name or 'the root'}: {error}"
                if strict:
                    raise type(error)(reason) from None
                left[module], new = reason, None
            if new is not None:
                found[module] = new
                continue
        children = [(f"{name}.{n}" if name else n, child) for n, child in module._modules.items() if child is not None]
        waiting[:0] = children
    return found


def _carry_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """As in folding a layer; an edited copy of a block has all that the block had, less what was taken from it."""
    return rebound(new) if type(new) is type(old) else carry_over(old, new)
