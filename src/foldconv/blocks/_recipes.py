"""What the families' files are written with: who knows which block, trees of branches, and edited copies of blocks.

A recipe is a function of a block. It writes the block's linear part as a tree of ordinary modules, has `convolution`
(or `linear`) compose it, and returns what takes the block's place: that layer, or an `edited` copy of the block that
holds it where the block's own ``forward`` looks. None says that there is nothing to fold, an `UnsupportedError` why it
cannot be done exactly.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..algebra import Kernel, Sum, kernel_of, kernel_rule
from ..algebra.norms import after_norm, norm_only, scale_and_shift
from ..errors import UnsupportedError
from ..layers import Foldable
from ..layers.foldable import layout_of

Fold = Callable[[Any], "nn.Module | None"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one kind of block folds.

    Args:
        fold: from the block to what takes its place.
        names: the classes that it is for (module and name), or the attributes that a block of this kind has.
        by_class: are `names` classes? Attributes prove nothing alone: the block is always run beside its fold.
        reads: the children that may read the block's input, where that need not be the first with parameters.
    """

    fold: Fold
    names: tuple[str, ...]
    by_class: bool
    reads: tuple[str, ...] = ()


RECIPES: list[Recipe] = []


def of_class(*names: str, reads: tuple[str, ...] = ()) -> Callable[[Fold], Fold]:
    """Register a recipe for classes, by module and name, so that no library has to be imported."""
    return _register(names, True, reads)


def of_attributes(*names: str, reads: tuple[str, ...] = ()) -> Callable[[Fold], Fold]:
    """Register a recipe for code that is copied from project to project, by the attributes that all copies have."""
    return _register(names, False, reads)


def _register(names: tuple[str, ...], by_class: bool, reads: tuple[str, ...]) -> Callable[[Fold], Fold]:
    def register(fold: Fold) -> Fold:
        RECIPES.append(Recipe(fold, names, by_class, reads))
        return fold

    return register


def recipe_of(module: nn.Module) -> Recipe | None:
    """The recipe for a module; None for everything that is no such block."""
    cls: Any = type(module)
    if cls.__module__.partition(".")[0] == "torch":
        return None
    # A subclass that keeps the forward computes what its base does.
    names = {f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__ if getattr(c, "forward", None) is cls.forward}
    # Looked up without `hasattr`, which wrappers answer for what they wrap.
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    known = (r for r in RECIPES if (names & {*r.names} if r.by_class else own.issuperset(r.names)))
    return next(known, None)


# ---------------------------------------------------------------------- trees


def chain(*modules: nn.Module | None) -> nn.Sequential:
    """Modules one after another; None stands for none."""
    return nn.Sequential(*(module for module in modules if module is not None))


def total(*branches: nn.Module | None) -> Sum:
    """Parallel branches, added; None stands for none."""
    return Sum(*(branch for branch in branches if branch is not None))


class Times(nn.Module):
    """A factor, one number or one per channel, in a tree; the block's own code is what runs it."""

    def __init__(self, factor: Any):
        super().__init__()
        self.factor = [factor]  # in a list: it stays the block's parameter


@kernel_rule(Times)
def _times(module: Times, channels: int, ndim: int) -> Kernel:
    factor = torch.as_tensor(module.factor[0], dtype=torch.float64).flatten()
    return Kernel.scaling(factor.expand(channels), None, ndim)


def norm_alone(norm: Any) -> nn.Module | None:
    """A norm without an activation; one with an activation is refused. None and modules that are no norm pass."""
    if norm is None:
        return None
    rest = after_norm(norm)
    parts = list(rest.children()) if isinstance(rest, nn.Sequential) else [rest]
    for part in parts:
        if not (isinstance(part, nn.Identity) or "Drop" in type(part).__name__):  # which evaluation mode does not run
            raise UnsupportedError(f"{type(norm).__name__} applies {type(part).__name__}, which no convolution can")
    return norm if isinstance(rest, nn.Identity) else norm_only(norm)


def conv_norm(branch: Any, conv: str = "conv", norm: str = "bn") -> nn.Sequential:
    """The convolution and the norm of a branch that holds them under these names and does nothing else."""
    for name in ("act", "aa"):
        other = getattr(branch, name, None)
        if other is not None and not isinstance(other, nn.Identity):
            raise UnsupportedError(f"{type(branch).__name__} applies {type(other).__name__}, which no convolution can")
    return chain(getattr(branch, conv), norm_alone(getattr(branch, norm, None)))


# ---------------------------------------------------------------------- what takes the place


def convolution(tree: nn.Module) -> nn.Module:
    """The plain convolution that computes a tree, composed in float64 and cast last to the type of its weights."""
    source = next((p for p in tree.parameters() if p.dim() > 1), next(tree.parameters()))
    reader = next(part for part in tree.modules() if isinstance(part, Foldable) or channels_read(part))
    channels = reader.to_kernel().in_channels if isinstance(reader, Foldable) else channels_read(reader)
    ndim = 1 if any(isinstance(m, (nn.Conv1d, nn.BatchNorm1d)) for m in tree.modules()) else 2
    kernel = kernel_of(tree, in_channels=channels, ndim=ndim)
    plain: Any = kernel.to_module()
    plain.to(dtype=source.dtype)
    # The memory format is a convolution's; one that is composed of a norm and a factor has none.
    plain.weight.data = plain.weight.data.contiguous(memory_format=layout_of(source, plain.weight))
    return _flagged(plain, tree)


def linear(layer: nn.Linear, before: tuple[nn.Module, ...] = (), after: tuple[nn.Module, ...] = ()) -> nn.Linear:
    """The linear layer that computes a linear layer with norms in front of it and behind it, of its features."""
    return realized_linear(*linear_values(layer, before, after), layer)


def linear_values(layer: nn.Linear, before: Iterable[nn.Module], after: Iterable[nn.Module]) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer with norms in front of it and behind it, in float64."""
    if type(layer).forward is not nn.Linear.forward:
        raise UnsupportedError(f"{type(layer).__name__} may compute anything where a Linear is expected")
    weight = layer.weight.double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
    for norm in reversed([*before]):
        scale, shift = scale_and_shift(norm)
        weight, bias = weight * scale, bias + weight @ shift
    for norm in after:
        scale, shift = scale_and_shift(norm)
        weight, bias = weight * scale[:, None], bias * scale + shift
    return weight, bias


def realized_linear(weight: Tensor, bias: Tensor, layer: nn.Linear) -> nn.Linear:
    """A linear layer of these values, of the type of `layer`."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    plain.weight, plain.bias = (nn.Parameter(v.detach().to(layer.weight.dtype)) for v in (weight, bias))
    return _flagged(plain, layer)


def _flagged(plain: Any, source: nn.Module) -> Any:
    """`plain`, learnt on where its source was."""
    return plain.requires_grad_(any(p.requires_grad for p in source.parameters()))


def edited(block: nn.Module, gone: tuple[str, ...] = (), **changes: Any) -> Any:
    """A copy of a block that shares everything with it but attributes, of which some are gone and some have new values.

    ``a__b`` names the attribute ``b`` of its child ``a``, which is copied likewise.
    """
    copied = block.__class__.__new__(block.__class__)
    vars(copied).update(vars(block))
    for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(copied)[table] = copy.copy(vars(block)[table])
    for name in gone:
        for place in (vars(copied), copied._parameters, copied._buffers, copied._modules):
            place.pop(name, None)
    for name, value in changes.items():
        child, inside, attribute = name.partition("__")
        setattr(copied, child, edited(getattr(copied, child), **{attribute: value}) if inside else value)
    return copied


def channels_read(module: Any) -> int:
    """The channels that a convolution, a norm or a linear layer reads; 0 for other modules."""
    if isinstance(module, (_ConvNd, nn.Linear)):
        return module.in_features if isinstance(module, nn.Linear) else module.in_channels
    return module.num_features if isinstance(module, _BatchNorm) else 0
