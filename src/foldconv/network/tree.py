"""A network as a tree of modules: walk it, copy it, replace modules in it, carry over what hung on them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..layers import Foldable


def expect_module(model: object) -> None:
    """Raise a TypeError for anything but a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, received {type(model).__name__}")


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, or an error that says what to do instead."""
    expect_module(model)
    # Computed tensors (a weight under weight_norm or pruning) refuse to be copied; their values will do.
    attributes = [value for module in model.modules() for value in vars(module).values()]
    computed = {id(v): v.detach().clone() for v in attributes if isinstance(v, torch.Tensor) and not v.is_leaf}
    try:
        return copy.deepcopy(model, computed)
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); pass inplace=True to change "
            "the model itself"
        ) from error


def foldable_layers(model: nn.Module) -> dict[str, Foldable]:
    """Every foldable layer by its first qualified name, outermost only.

    >>> import foldconv
    >>> list(foldable_layers(foldconv.expand(nn.Sequential(nn.Conv2d(1, 1, 3)), "doconv")))
    ['0']
    """
    found: dict[nn.Module, str] = {}
    for name, module in walk(model):
        if isinstance(module, Foldable):
            found.setdefault(module, name)
    return {name: module for module, name in found.items()}  # pyright: ignore[reportReturnType]


def walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under every one of its names, without looking inside foldable layers."""
    expect_module(model)
    yield prefix, model
    if not isinstance(model, Foldable):
        for name, child in model._modules.items():
            if child is not None:
                yield from walk(child, f"{prefix}.{name}" if prefix else name)


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each new module wherever a parent holds the old one; the new root if the root is among them.

    Parents hold modules by registration, and some also in plain lists, tuples and dicts among their attributes.
    """
    for _, parent in list(walk(model)):
        for name, value in list(vars(parent).items()):
            new = _substituted(value, replacements)
            if new is not value:
                vars(parent)[name] = new
    return replacements.get(model, model)


def _substituted(value: Any, replacements: dict[nn.Module, nn.Module]) -> Any:
    """The value with modules replaced, lists and dicts changed in place."""
    if isinstance(value, nn.Module):
        return replacements.get(value, value)
    if isinstance(value, dict):
        for key, item in list(value.items()):
            new = _substituted(item, replacements)
            if new is not item:
                value[key] = new
    elif type(value) is list:
        value[:] = [_substituted(item, replacements) for item in value]
    elif type(value) is tuple:
        items = tuple(_substituted(item, replacements) for item in value)
        return value if all(a is b for a, b in zip(items, value)) else items
    return value


# Bound to the old module, so never carried over.
_BOUND = {"forward", "_compiled_call_impl", "_kept"}


def carry_over(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give the new layer the old one's hooks and whatever users attached to it; training flag included.

    What the new one has already is its own, and a foldable layer knows what it was built with.
    """
    own = {*vars(target), *getattr(source, "_built_with", ()), *_BOUND}
    for name, value in vars(source).items():
        if "_hook" in name or name not in own:
            target.__dict__[name] = value
    hooks = target._load_state_dict_pre_hooks
    for key, hook in hooks.items():
        if getattr(hook, "with_module", False):
            # torch remembers the module this hook was registered on, and weakly.
            hooks[key] = type(hook)(hook.hook, target)  # pyright: ignore[reportCallIssue]
    target.training = source.training
    return target


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
