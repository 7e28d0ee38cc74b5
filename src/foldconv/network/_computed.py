"""Weights that are computed from other tensors before each forward, by torch's utilities for it.

Pruning, weight_norm and spectral_norm keep what is learned under other names, and either a forward pre-hook or a
parametrization (a property in a class of the module's own) gives the weight. `bake` makes that a parameter again, as
evaluation mode computes it, on a copy: torch's own functions for it would take the property from the class, which
copies share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ..errors import UnsupportedError

# The functions of these names hide the modules that they are in.
_NORMS = {"torch.nn.utils.weight_norm": "WeightNorm", "torch.nn.utils.spectral_norm": "SpectralNorm"}
_BESIDE = ("_orig", "_mask", "_g", "_v", "_u")
"""What the utilities keep beside a weight, by the ends of the names."""


def is_computing(hook: Any) -> bool:
    """Does a hook compute a weight, or serve one that does?"""
    hook = getattr(hook, "hook", hook)
    return isinstance(hook, prune.BasePruningMethod) or any(
        cls.__module__ in _NORMS and cls.__name__.startswith(_NORMS[cls.__module__]) for cls in type(hook).__mro__
    )


def is_computed(module: nn.Module) -> bool:
    """Is a weight or bias in the module computed from something else?"""
    return any(
        parametrize.is_parametrized(part) or any(map(is_computing, part._forward_pre_hooks.values())) or _plain(part)
        for part in module.modules()
    )


def refuse_unknown(module: nn.Module) -> None:
    """Refuse weights that are no parameters where a hook that nobody knows may compute them.

    Raises:
        UnsupportedError: naming the hook, which only its maker can remove.
    """
    for name, part in module.named_modules():
        hooks = part._forward_pre_hooks.values()
        left = _plain(part) - _names(filter(is_computing, hooks))
        others = [getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks if not is_computing(hook)]
        if left and others:
            where = f"{name}: " if name else ""
            raise UnsupportedError(
                f"{where}its {', '.join(sorted(left))} is no parameter and may be computed by its forward pre-hook "
                f"{', '.join(others)}; remove that as its maker says, so that the value is a parameter, then fold"
            )


def bake(module: nn.Module) -> nn.Module:
    """Make what is computed in the module parameters of the values that its forward uses in evaluation mode.

    Args:
        module: in evaluation mode, and of nobody else's: it is changed.
    """
    for part in module.modules():
        if not part._modules.get("parametrizations"):
            continue
        before = parametrize.type_before_parametrizations(part)
        for key, sources in part.get_submodule("parametrizations").named_children():
            _register(part, key, getattr(part, key), any(p.requires_grad for p in sources.parameters()))
        del part._modules["parametrizations"]
        part.__class__ = before
    for part in module.modules():
        hooks = {key: hook for key, hook in part._forward_pre_hooks.items() if is_computing(hook)}
        for hook in hooks.values():
            hook(part, ())
        computed = _names(hooks.values())
        left = _plain(part) - computed
        for key in computed | left:
            value, trained = getattr(part, key), False
            for holder in (part._parameters, part._buffers, vars(part)):
                beside = [holder.pop(key + end, None) for end in _BESIDE if key + end not in left]
                trained |= any(isinstance(t, nn.Parameter) and t.requires_grad for t in beside)
            _register(part, key, value, trained or value.requires_grad)
        for key in hooks:
            del part._forward_pre_hooks[key]
    return module


def _names(hooks: Iterable[Any]) -> set[str]:
    """The names of the weights that torch's hooks compute."""
    return {getattr(hook, "_tensor_name", None) or hook.name for hook in hooks}


def _register(part: nn.Module, name: str, value: Tensor, trained: bool) -> None:
    vars(part).pop(name, None)
    part._parameters[name] = nn.Parameter(value.detach().clone(), trained)


def _plain(part: nn.Module) -> set[str]:
    """Names of weights that are tensors in no register of the module."""
    names = {"weight", "bias", *getattr(part, "composed_from", ())}
    return {name for name in names if isinstance(vars(part).get(name), Tensor)}


def cast_plain(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the tensors that are in no register, too, which ``module.to`` leaves alone."""
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(part)[name] = value.to(dtype)


def without_computing(hooks: dict) -> dict:
    """The very same hooks, or those that compute no weights in a new dictionary of that kind."""
    if not any(map(is_computing, hooks.values())):
        return hooks
    return type(hooks)((key, hook) for key, hook in hooks.items() if not is_computing(hook))


def only_computing(hooks: dict) -> Iterator[tuple[Any, Any]]:
    """The hooks that compute weights."""
    return ((key, hook) for key, hook in hooks.items() if is_computing(hook))
