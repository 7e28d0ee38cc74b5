"""`expand`: put foldable layers in the place of convolutions, everywhere, or nowhere if anything is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._arguments import expect_flags
from .._selection import Patterns
from ..algebra.norms import after_norm
from ..errors import UnsupportedError
from ..layers import Foldable, NormPlace
from ..methods import Method, as_method
from ..methods._registry import Init, expect_init
from ._fusers import guard_fusers
from ._subclasses import as_plain
from ._whole import whole_difference
from .fold import fold
from .plan import Choice
from .tree import carry_over, changeable, copy_of, first_names, replace_modules, usual_conditions, walk


def expand(
    model: nn.Module,
    method: str | Method,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    init: Init = "preserve",
    example_inputs: Any = None,
    inplace: bool = False,
) -> nn.Module:
    """The model with its convolutions replaced by foldable ones.

    Convolutions that have no exact replacement stay as they are: subclasses that compute something else, weights that
    are computed (weight_norm, pruning) or that the model reads itself, and what the method does not apply to. The
    logger ``foldconv`` says in one line how many stay and why; `foldconv.plan` tells of each.

    Args:
        model: any module, also a single convolution.
        method: a name (``"doconv"``) or a config (``foldconv.DOConv(depth_multiplier=12)``).
        include, exclude: glob patterns on qualified names (``"layer1.*"``), one or several.
        where: a further condition ``where(name, module) -> bool``.
        init: ``"preserve"`` keeps the function the model computes; ``"paper"`` draws the method's own initial values,
            for training from scratch.
        example_inputs: what the model is called with (a tensor, a tuple of arguments, or a dictionary of keyword
            arguments), in a batch of at least two. A copy of the model then runs on it, in evaluation and in training
            mode, which shows what norm follows what convolution where tracing cannot. With ``init="preserve"`` the
            expanded model has to give the same as well.
        inplace: change `model` itself; by default a copy is changed. In place, an optimizer that already holds the
            model's parameters stays valid, but does not know the new ones.

    Returns:
        The expanded model; a new root when `model` is itself a convolution.

    Raises:
        NoMatchError: when nothing was replaced, or a pattern matches no convolution.
        UnsupportedError: for an unknown method, a named convolution that cannot be replaced exactly, weights shared
            with a module that stays, a model that cannot be copied, or one whose output on `example_inputs` changes.
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
    expect_init(init)
    expect_flags(inplace=inplace)
    model = changeable(model)
    # Chosen on the caller's own model, so that `where` may compare modules by identity.
    choice = Choice(model, config, include, exclude, where, example_inputs)
    chosen, pairs = choice.chosen(), choice.pairs
    choice.log()
    first = first_names(model)
    norms = {first[conv]: first[norm] for conv, norm in pairs.items() if conv in chosen}
    if example_inputs is not None and init == "preserve":
        expanded = _expanded(copy_of(model), config, [*chosen.values()], norms, init)
        if found := whole_difference(model, expanded, example_inputs):
            raise UnsupportedError(
                f"example_inputs: the expanded {type(model).__name__} gives another output{found}; its forward uses "
                "more of its layers than what they give, such as the number of their parameters: compute that outside "
                "of it, or exclude the layers that it is about"
            )
        if not inplace:
            return expanded
    if not inplace:
        return _expanded(copy_of(model), config, [*chosen.values()], norms, init)
    touched = [*chosen, *(pairs[conv] for conv in chosen if conv in pairs)]
    saved = [(t, t.detach().clone()) for m in touched for t in (*m.parameters(), *m.buffers())]
    try:
        return _expanded(model, config, [*chosen.values()], norms, init)
    except BaseException:
        # A method may have drawn the weights of earlier layers anew.
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)
        raise


def _expanded(work: nn.Module, config: Method, convs: list[str], norms: dict[str, str], init: Init) -> nn.Module:
    """The model itself with its convolutions of these names, and the norms that follow them, replaced."""
    modules = dict(walk(work))
    chosen = {name: (modules[name], config) for name in convs}
    return put_in(work, expanded_layers(chosen, {modules[c]: modules[n] for c, n in norms.items()}, init))


def put_in(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> nn.Module:
    """The model itself with foldable layers in the places of its own; blocks that fuse themselves fold them first."""
    return guard_fusers(replace_modules(model, layers), fold)


@usual_conditions()
def expanded_layers(
    chosen: dict[str, tuple[nn.Module, Method]], norms: dict[nn.Module, nn.Module], init: Init = "preserve"
) -> dict[nn.Module, nn.Module]:
    """The foldable layer for each named convolution, with its hooks and ties; the model itself is not touched.

    `norms` gives the norm that follows a convolution alone, for methods that take it in.

    Raises:
        UnsupportedError: naming the convolution that its method cannot expand.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    first_of: dict[int, tuple[str, nn.Module]] = {}
    for name, (conv, config) in chosen.items():
        norm = norms.get(conv) if config.takes_norm else None
        try:
            layer: Any = config.expand(as_plain(conv), init, norm)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name or 'the root'}: {error}") from None
        twin_name, twin = first_of.setdefault(id(conv.weight), (name, layer))
        if twin is not layer:
            _share(name, layer, twin_name, twin)
        replacements[conv] = layer
        if norm is not None:
            place = NormPlace(layer, norm, after_norm(norm))
            replacements[norm] = place
            place.training = norm.training
    for conv, layer in replacements.items():
        if isinstance(layer, Foldable):
            layer.note_attributes()
            carry_over(conv, layer)
    return replacements


def _share(name: str, layer: nn.Module, twin_name: str, twin: nn.Module) -> None:
    """Convolutions that share a weight share what is learned beside it, so that they fold to one weight again."""
    ours, theirs = ({n: p for n, p in m.named_parameters() if n != "bias"} for m in (layer, twin))
    alike = type(layer) is type(twin) and ours.keys() == theirs.keys()
    if not alike or any("." in n or p.shape != theirs[n].shape for n, p in ours.items()):
        raise UnsupportedError(
            f"{name} shares its weight with {twin_name}, but they are expanded to {type(layer).__name__} and "
            f"{type(twin).__name__} with parameters that cannot be shared; exclude both"
        )
    for key, parameter in theirs.items():
        setattr(layer, key, parameter)
