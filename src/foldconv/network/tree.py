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
    return _copy(model, computed, "; pass inplace=True to change the model itself")


def shadow_of(model: nn.Module) -> nn.Module:
    """A copy with the same tensors, in evaluation mode: running its Python code leaves no trace in the model."""
    held = [m.__dict__ | m._parameters | m._buffers for m in model.modules()]
    tensors = {id(v): v for values in held for v in values.values() if isinstance(v, torch.Tensor)}
    shadow = _copy(model, tensors, ", which following its data flow needs; fold with batchnorm=False")
    for module in shadow.modules():
        module.training = False  # a user's own `eval` might write to the tensors
    return shadow


def _copy(model: nn.Module, known: dict[int, Any], otherwise: str) -> nn.Module:
    try:
        return copy.deepcopy(model, known)
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}){otherwise}"
        ) from error


def foldable_layers(model: nn.Module) -> dict[str, Foldable]:
    """Every foldable layer by its first qualified name, outermost only.

    >>> import foldconv
    >>> list(foldable_layers(foldconv.expand(nn.Sequential(nn.Conv2d(1, 1, 3)), "doconv")))
    ['0']
    """
    return {name: module for module, name in first_names(model).items() if isinstance(module, Foldable)}


def first_names(model: nn.Module) -> dict[nn.Module, str]:
    """Every module that `walk` finds with the first of its names, in that order."""
    found: dict[nn.Module, str] = {}
    for name, module in walk(model):
        found.setdefault(module, name)
    return found


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
_BOUND = {"forward", "_compiled_call_impl"}


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
