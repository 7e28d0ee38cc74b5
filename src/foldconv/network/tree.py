"""A network as a tree of modules: walk it, copy it, replace modules in it, carry over what hung on them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Kernel
from ..errors import UnsupportedError
from ..layers import Foldable, NormPlace
from ..layers.handover import unchecked
from ._computed import bake, cast_plain, is_computed, only_computing, without_computing
from ._holding import Exchange, holds_nothing


def expect_module(model: object) -> None:
    """Raise a TypeError for anything but a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, received {type(model).__name__}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel``; any other as it is.

    >>> net = nn.Sequential(nn.ReLU())
    >>> unwrapped(torch.compile(net)) is unwrapped(nn.DataParallel(net)) is net
    True
    """
    expect_module(model)
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def changeable(model: nn.Module) -> nn.Module:
    """The unwrapped model, if its modules can be replaced.

    Raises:
        UnsupportedError: for a scripted or traced module.
    """
    model = unwrapped(model)
    for name, module in model.named_modules():
        kinds = {cls.__name__ for cls in _subclasses(Foldable)} if isinstance(module, torch.jit.ScriptModule) else ()
        if isinstance(model, torch.jit.ScriptModule) or getattr(module, "original_name", None) in kinds:
            raise UnsupportedError(
                f"{name or 'the model'} is scripted or traced (torch.jit), so nothing in it can be replaced; expand or "
                "fold the module that it was made from, then script or trace that"
            )
    return model


def _subclasses(cls: type) -> Iterator[type]:
    for derived in cls.__subclasses__():
        yield derived
        yield from _subclasses(derived)


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    # Importing the compiler to ask for its class would take seconds.
    return model._modules.get("_orig_mod") if type(model).__name__ == "OptimizedModule" else None


@contextlib.contextmanager
def usual_conditions() -> Iterator[None]:
    """New tensors are made where they belong and can be trained, whatever device and mode the caller works with.

    Layers whose norm has its place elsewhere may be run alone.
    """
    with torch.inference_mode(False), torch.device("cpu"), unchecked():
        yield


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy of the unwrapped model, or an error that says what to do instead."""
    return replace_modules(_copy(unwrapped(model), "; pass inplace=True to change the model itself"), {})


def shadow_of(model: nn.Module, training: bool) -> tuple[nn.Module, dict[int, int]]:
    """A copy in one mode that shares no tensor: running its Python code leaves no trace in the model.

    Also returns the ids of the model's parameters and buffers by those of their copies. The copy's own ``train`` and
    ``eval`` set the mode, where they leave its modules in their places.
    """
    why = ", which following its data flow needs (to fold without: batchnorm=False)"
    own, shadow = _switches_itself(model), _copy(model, why)
    if own and not _switched(shadow, training):
        own, shadow = False, _copy(model, why)
    for module in () if own else shadow.modules():
        _set_mode(module, training)
    originals = {}
    for ours, theirs in zip(shadow.modules(), model.modules()):
        if isinstance(ours, torch.jit.ScriptModule):
            continue
        for held in ("_parameters", "_buffers"):
            originals |= {id(t): id(vars(theirs)[held].get(name)) for name, t in vars(ours)[held].items()}
    return shadow, originals


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """What was compiled runs as it was written."""
    # Importing the compiler takes seconds; where nobody has, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


@usual_conditions()
def _copy(model: nn.Module, otherwise: str, known: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy in the same modes that knows nothing of the model's own modules."""
    found = Exchange({})
    try:
        found.of(model)
        kept = {id(reference): reference for reference in found.references}
        kept |= _empty_in(model) | _values_of_computed(found.tensors) | (known or {})
        copied = copy.deepcopy(model, kept)
        # What deep copies share (closures, weak references) may still lead to the model itself.
        ours = dict(copied.named_modules(remove_duplicate=False))
        theirs = {m: ours[name] for name, m in model.named_modules(remove_duplicate=False) if name in ours}
        _expect_own(copied, model)
        left = _Leftover(theirs)
        left.of(copied)
        left.commit()
    except UnsupportedError as error:
        raise UnsupportedError(f"{type(model).__name__} cannot be copied: {error}{otherwise}") from None
    except Exception as error:
        for name, module in model.named_modules():
            tensors: list[Any] = [*module._parameters.values(), *module._buffers.values()]
            if any(map(nn.parameter.is_lazy, tensors)):
                raise UnsupportedError(
                    f"{name or 'the root'} ({type(module).__name__}) is lazy and has no values yet; run the model once "
                    "on an input before"
                ) from None
        raise UnsupportedError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}){otherwise}"
        ) from error
    for old, new in theirs.items():
        _set_mode(new, getattr(old, "training", False))
    return copied


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names that the unwrapped network has.

    >>> list(state_of(nn.DataParallel(nn.Sequential(nn.DataParallel(nn.Linear(1, 1, bias=False))))))
    ['0.weight']
    """
    model = unwrapped(model)
    state = model.state_dict()
    wrappers = [name for name, module in model.named_modules() if _inside(module) is not None]
    for outer in sorted(wrappers, key=len, reverse=True):
        ((inner, _),) = model.get_submodule(outer).named_children()
        long = f"{outer}.{inner}."
        state = {name.replace(long, f"{outer}.", 1) if name.startswith(long) else name: t for name, t in state.items()}
    return state


def quiet_copy(layer: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy in evaluation mode that nobody watches: it has only those hooks that compute its weights.

    Args:
        layer: of any mode.
        dtype: what the copy's tensors are cast to; None: their own.
    """
    parts = list(layer.modules())
    hooks = [value for part in parts for name, value in vars(part).items() if "_hook" in name]
    kept: dict[int, Any] = {id(each): type(each)(only_computing(each)) for each in hooks if isinstance(each, dict)}
    if dtype is not None:  # cast as they are copied, which saves a copy of each
        held = [t for part in parts for t in (*part._parameters.values(), *part._buffers.values()) if t is not None]
        kept |= {id(t): _cast(t, dtype) for t in held if type(t) in (Tensor, nn.Parameter) and t.is_floating_point()}
    copied = _copy(layer, ", which its fold needs", kept)
    for part in copied.modules():
        _set_mode(part, False)
    if dtype is not None:
        cast_plain(copied.to(dtype), dtype)
    return copied


def restore(place: NormPlace, kernel: Kernel) -> tuple[Kernel, Any]:
    """A kernel without bias, and a norm to be put back into a place, that compute `kernel` together."""
    norm = place.link[1]
    # What computes the norm's weights would write over those that are set.
    return place.restore(kernel, bake(copy_of(norm).eval()) if is_computed(norm) else None)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    values = tensor.detach().to(dtype, copy=True)
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _expect_own(copied: nn.Module, model: nn.Module) -> None:
    """Refuse a copy that is, in part, what was to be copied: somebody's ``__deepcopy__`` may do as it likes."""
    theirs = {id(each) for m in model.modules() for each in (m, *m._parameters.values(), *m._buffers.values())}
    for name, module in copied.named_modules():
        for each in (module, *module._parameters.values(), *module._buffers.values()):
            if each is not None and id(each) in theirs:
                what = f"{name or 'the root'} ({type(module).__name__})"
                raise UnsupportedError(f"a deep copy of {what} shares its {type(each).__name__} with the original")


class _Leftover(Exchange):
    """Finds what a copy still holds of the model; weak references are turned to the copy."""

    def _module(self, module: nn.Module, where: str) -> nn.Module:
        if module in self._replacements:
            raise UnsupportedError(f"{where} would still lead a copy to the original's {type(module).__name__}")
        return super()._module(module, where)


def _empty_in(model: nn.Module) -> dict[int, Any]:
    """Copies of the empty dicts of modules, most of them for hooks; `deepcopy` would take half of its time for them."""
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(value): type(value)() for value in held if type(value) in (dict, OrderedDict) and holds_nothing(value)}


def _values_of_computed(tensors: list[Tensor]) -> dict[int, Any]:
    """Copies of the tensors that refuse to be copied as they are.

    Computed ones (a weight under weight_norm, a kept activation), those with such a gradient, and those that were made
    in inference mode and could not be trained.
    """
    values = {id(t): t.detach().clone() for t in tensors if not (nn.parameter.is_lazy(t) or t.is_leaf)}
    for tensor in (t for t in tensors if not nn.parameter.is_lazy(t) and t.is_leaf):
        if tensor.is_inference() or (tensor.grad is not None and not tensor.grad.is_leaf):
            value = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            twin = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
            values[id(tensor)] = twin
            twin.grad = None if tensor.grad is None else tensor.grad.detach().clone()
    return values


def _set_mode(module: nn.Module, training: bool) -> None:
    """Set the flag, and the graph of a feature extractor of torchvision, which has one for each mode."""
    if hasattr(module, "training"):  # a frozen scripted module has none
        module.training = training
    graph = vars(module).get("train_graph" if training else "eval_graph")
    if graph is not None and vars(module).get("_graph") is not graph:
        module.graph = graph


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
    """Every module under every one of its names, without looking inside foldable layers; wrappers are no modules."""
    model = unwrapped(model)
    yield prefix, model
    if not isinstance(model, Foldable):
        for name, child in model._modules.items():
            if child is not None:
                yield from walk(child, f"{prefix}.{name}" if prefix else name)


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each new module wherever something in the model holds the old one; the new root if the root is among them.

    Wrappers are left out, so that names are the plain network's.

    Raises:
        UnsupportedError: naming the place where no other module can be put; nothing was replaced then.
    """
    model = unwrapped(model)
    exchange = Exchange(replacements, unwrapped)
    try:
        new = exchange.of(model)
    except RecursionError:
        raise UnsupportedError(f"{type(model).__name__} holds values in too many levels to look through") from None
    exchange.commit()
    return new


# Bound to the old module, so never carried over.
_BOUND = {"forward", "_compiled_call_impl"}


def carry_over(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give the new layer the old one's hooks and whatever users attached to it; training flag included.

    What the new one has already is its own, and a foldable layer knows what it was built with.
    """
    own = {*vars(target), *target._parameters, *getattr(source, "_built_with", ()), *_BOUND}
    for name, value in vars(source).items():
        if "_hook" in name and isinstance(value, dict):
            target.__dict__[name] = without_computing(value)
        elif "_hook" in name or name not in own:
            target.__dict__[name] = value
    target.training = source.training
    return rebound(target)


def rebound(module: nn.Module) -> nn.Module:
    """The module, with the hooks bound to it that were registered on one whose place it takes."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in hooks.items():
        if getattr(hook, "with_module", False):
            # torch remembers the module this hook was registered on, and weakly.
            hooks[key] = type(hook)(hook.hook, module)  # pyright: ignore[reportCallIssue]
    return module


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode for a while, every module with its own flag back; a copy, if the user has a say.

    What a user's own ``train`` or ``eval`` does (merge weights, choose branches) is done to a copy.
    """
    flags = {m: m.training for m in unwrapped(model).modules() if hasattr(m, "training")}
    if not any(flags.values()):
        yield unwrapped(model)
    elif _switches_itself(model):
        yield copy_of(model).eval()
    else:
        try:
            for module in flags:
                module.training = False
            yield unwrapped(model)
        finally:
            for module, flag in flags.items():
                module.training = flag


def _switches_itself(model: nn.Module) -> bool:
    """Do modules have a ``train`` or ``eval`` of their own, all of which are about modes?"""
    own = [module for module in model.modules() if hasattr(module, "training") and _has_own_switch(module)]
    return bool(own) and all(_takes_mode(module.train) for module in own)


def _takes_mode(train: Any) -> bool:
    """May it be called with True or False alone? That of ultralytics' YOLO would begin a training."""
    try:
        first = next(iter(inspect.signature(train).parameters.values()), None)
    except (TypeError, ValueError):
        return False
    return first is not None and (isinstance(first.default, bool) or first.default is first.empty)


def _switched(model: nn.Module, training: bool) -> bool:
    """Set the mode by the model's own functions; False, where they fail or change what is where."""
    before = list(model.named_modules())
    with contextlib.suppress(Exception):
        model.train() if training else model.eval()
        return list(model.named_modules()) == before
    return False


def _has_own_switch(module: nn.Module) -> bool:
    if type(module) is NormPlace:  # it passes flags on to norms, which get theirs anyway
        return False
    own = any(name in vars(module) for name in ("train", "eval"))
    return own or type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval
