"""A block as a tree: walk it, and copy it."""

# pyright: reportMissingImports=false
from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from mxnet import autograd, gluon

from .._arguments import expect


def named(block: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The block and all below it, under every one of their names."""
    yield prefix, block
    for name, child in block._children.items():
        yield from named(child, f"{prefix}.{name}" if prefix else name)


def walk(block: Any) -> Iterator[Any]:
    """The block and all below it, each once."""
    seen: set[int] = set()
    stack = [block]
    while stack:
        current = stack.pop()
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            stack.extend(reversed(list(current._children.values())))


def copy_of(block: Any) -> Any:
    """A deep copy that trains: compiled graphs, trainers and the name scopes of parents stay behind."""
    expect("block", block, gluon.Block, "a Block of Gluon")
    memo: dict[int, Any] = {}
    inside = {id(part._scope) for part in walk(block)}
    for part in walk(block):
        left = [getattr(part, "_cached_op", None), part._scope._name_scope]
        if id(part._scope._old_scope) not in inside:
            left.append(part._scope._old_scope)
        parameters = (*part._reg_params.values(), *part.params.values())
        left += [parameter._trainer for parameter in parameters]
        memo.update({id(thing): None for thing in left if thing is not None})
        with autograd.pause():
            # A deep copy of an array on cpu(1) would be on cpu(0).
            for array in {id(array): array for p in parameters for array in p._data or ()}.values():
                memo.setdefault(id(array), array.copy())
    work = copy.deepcopy(block, memo)
    for part in walk(work):
        if isinstance(part, gluon.HybridBlock):
            part._clear_cached_op()
        for parameter in part._reg_params.values():
            request = parameter.grad_req
            if request != "null" and parameter._data is not None:
                # Copied arrays do not know their gradients: asking anew attaches them.
                parameter.grad_req = "null"
                parameter.grad_req = request
    return work
