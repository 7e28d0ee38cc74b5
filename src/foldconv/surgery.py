"""`expand`: put foldable layers in the place of convolutions, everywhere, or nowhere if anything is wrong."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from .errors import NoMatchError, UnsupportedError, nearest
from .layers import Foldable
from .layers.foldable import PLAIN, plain_class
from .methods import Method, as_method
from .methods._registry import Init

Patterns = str | Iterable[str] | None


def expand(
    model: nn.Module,
    method: str | Method,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    init: Init = "preserve",
    inplace: bool = False,
) -> nn.Module:
    """The model with its convolutions replaced by foldable ones.

    Args:
        model: any module, also a single convolution.
        method: a name (``"doconv"``) or a config (``foldconv.DOConv(depth_multiplier=12)``).
        include, exclude: glob patterns on qualified names (``"layer1.*"``), one or several.
        where: a further condition ``where(name, module) -> bool``.
        init: ``"preserve"`` keeps the function the model computes; ``"paper"`` draws the method's own initial values,
            for training from scratch.
        inplace: change `model` itself; by default a copy is changed. In place, an optimizer that already holds the
            model's parameters stays valid, but does not know the new ones.

    Returns:
        The expanded model; a new root when `model` is itself a convolution.

    Raises:
        NoMatchError: when nothing was replaced, or a pattern matches no convolution.
        UnsupportedError: for an unknown method, or a named convolution that cannot be replaced exactly.
        In every case `model` is as it was.

    Example:
        >>> import torch, foldconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> rich = foldconv.expand(net, "doconv")
        >>> type(rich[0]).__name__, type(net[0]).__name__
        ('DOConv2d', 'Conv2d')
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(rich(x), net(x))
        True
    """
    config = as_method(method)
    if init not in ("preserve", "paper"):
        raise UnsupportedError(f"init: expected 'preserve' or 'paper', received {init!r}")
    work = model if inplace else copy.deepcopy(model)
    chosen = _choose(work, config, _as_list(include), _as_list(exclude), where)
    replacements: dict[nn.Module, nn.Module] = {}
    first_of: dict[int, nn.Module] = {}
    for name, conv in chosen.items():
        try:
            layer = config.expand(conv, init)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name or 'the root'}: {error}") from None
        # Convolutions that share a weight share what is learned beside it, so that they fold to one weight again.
        twin = first_of.setdefault(id(conv.weight), layer)
        if twin is not layer and type(twin) is type(layer):
            for key, parameter in twin.named_parameters(recurse=False):
                if key != "bias":
                    setattr(layer, key, parameter)
        carry_over(conv, layer)
        replacements[conv] = layer
    return replace_modules(work, replacements)


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
    yield prefix, model
    if not isinstance(model, Foldable):
        for name, child in model._modules.items():
            if child is not None:
                yield from walk(child, f"{prefix}.{name}" if prefix else name)


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each new module wherever the old one is registered; the new root if the root is among them."""
    for _, parent in list(walk(model)):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                parent._modules[name] = replacements[child]
                # A module may also be reachable as an ordinary attribute; torch keeps those apart.
    return replacements.get(model, model)


def carry_over(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give the new layer the old one's hooks and whatever users attached to it; training flag included."""
    own = set(getattr(source, "structure", ())) | {"_parameters", "_buffers", "_modules", "_kept"}
    for name, value in vars(source).items():
        if name.endswith("_hooks") or "_hooks_" in name or (name not in own and name not in vars(target)):
            target.__dict__[name] = value
    target.training = source.training
    return target


# ---------------------------------------------------------------------- which convolutions


def _choose(
    model: nn.Module,
    config: Method,
    include: list[str] | None,
    exclude: list[str] | None,
    where: Callable[[str, nn.Module], bool] | None,
) -> dict[str, nn.Module]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in walk(model):
        if isinstance(module, PLAIN) and not isinstance(module, Foldable):
            names.setdefault(module, []).append(name)
    everywhere = [name for group in names.values() for name in group]
    for pattern in (include or []) + (exclude or []):
        if not fnmatch.filter(everywhere, pattern):
            raise NoMatchError(
                f"the pattern {pattern!r} matches no convolution of {type(model).__name__}"
                f"{nearest(pattern, everywhere)}; expected a glob on names such as {_some(everywhere)}"
            )
    chosen: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    for conv, group in names.items():
        name = group[0]
        if include is not None and not _any_match(group, include):
            continue
        if exclude is not None and _any_match(group, exclude):
            continue
        if where is not None and not where(name, conv):
            continue
        reason = _reason_against(conv) or config.reason_against(conv)
        if reason is None:
            chosen[name] = conv
        elif include is not None and set(include) & set(group):
            raise UnsupportedError(f"{name}: {type(conv).__name__} cannot become {config.name}: {reason}")
        else:
            refused[name] = reason
    if not chosen:
        raise NoMatchError(_nothing(model, config, everywhere, refused))
    _check_ties(names, chosen)
    return chosen


def _reason_against(conv: nn.Module) -> str | None:
    """Why no method may replace this convolution."""
    cls = plain_class(conv)
    weight = conv._parameters.get("weight")
    if type(conv) is not cls:
        return f"{type(conv).__module__}.{type(conv).__name__} overrides {cls.__name__}, so it may compute another function"  # pyright: ignore
    if isinstance(weight, nn.UninitializedParameter):
        return "it is lazy and has no weight yet; run the model once before expanding it"
    if weight is None:
        return "its weight is computed from something else (weight_norm, spectral_norm or pruning); remove that first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}; expected a floating point type"
    return None


def _check_ties(names: dict[nn.Module, list[str]], chosen: dict[str, nn.Module]) -> None:
    replaced = {id(conv.weight): name for name, conv in chosen.items()}
    for conv, group in names.items():
        if group[0] not in chosen and id(conv._parameters.get("weight")) in replaced:
            raise UnsupportedError(
                f"{replaced[id(conv.weight)]} shares its weight with {group[0]}, which would stay plain; folding would "
                "untie them: include both or exclude both"
            )


def _nothing(model: nn.Module, config: Method, everywhere: list[str], refused: dict[str, str]) -> str:
    what = f"nothing to expand with {config.name!r} in {type(model).__name__}: "
    if not everywhere:
        return f"{what}expected convolutions (nn.Conv1d ... nn.ConvTranspose3d), found none"
    if not refused:
        return f"{what}none of its {len(everywhere)} convolutions is selected by include, exclude and where"
    name, reason = next(iter(refused.items()))
    return f"{what}{len(refused)} convolutions selected, none of them replaceable; {name or 'the root'}: {reason}"


def _as_list(patterns: Patterns) -> list[str] | None:
    return None if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)


def _any_match(names: list[str], patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "") if names else "(there are none)"
