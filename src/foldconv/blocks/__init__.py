"""Other people's blocks: which ones `fold` knows, and what takes their place.

A network from another library, or from a paper's code, may hold blocks that are trained as several branches and meant
to be folded. Those that follow our algebra fold like our own layers: composed in float64, cast last, and run beside the
original. Blocks of an installed library are known by their class, without importing it; code that is copied from
project to project by the attributes that all copies have, and then only that run proves what the block is.

Their classes stay: a block's own ``forward`` finds the folded convolution where the block's own code would have put
it, and the state dict is that of their own fold. A block that was linear throughout becomes the convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FoldMismatchError, UnsupportedError
from ..layers.foldable import is_altered
from . import copied, timm, ultralytics  # noqa: F401  (they register what they know)
from ._recipes import RECIPES, Recipe, channels_read, recipe_of

TOLERANCE = 1e-10
"""Largest difference, relative to the output's largest value, between a block and its fold in float64."""


def folded_block(block: nn.Module, check: bool = True) -> nn.Module | None:
    """What takes the place of another library's block; None for a module that is no such block, or is folded already.

    The block itself is left as it is. Hooks are not carried over.

    Args:
        block: any module.
        check: run a block that is known by its class beside its fold; one known by its attributes always is.

    Raises:
        UnsupportedError: when a part of the block is watched, was replaced, or has no exact fold.
        FoldMismatchError: when the fold does not compute what the block does, or its values do not fit their type.

    Example:
        >>> class RepConv(nn.Module):  # as in YOLOv7
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         conv, point = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        ...         self.rbr_dense = nn.Sequential(conv, nn.BatchNorm2d(channels))
        ...         self.rbr_1x1 = nn.Sequential(point, nn.BatchNorm2d(channels))
        ...         self.rbr_identity, self.act = nn.BatchNorm2d(channels), nn.SiLU()
        ...
        ...     def forward(self, x):
        ...         if hasattr(self, "rbr_reparam"):
        ...             return self.act(self.rbr_reparam(x))
        ...         return self.act(self.rbr_dense(x) + self.rbr_1x1(x) + self.rbr_identity(x))
        >>> folded_block(RepConv(8))
        RepConv(
          (act): SiLU()
          (rbr_reparam): Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        )
        >>> folded_block(nn.Conv2d(3, 8, 3)) is None
        True
    """
    recipe = recipe_of(block)
    if recipe is None:
        return None
    with torch.no_grad():
        new = _folded(block, recipe)
        if new is None:
            return None
        _refuse_watched(block, new)
        _refuse_non_finite(block, new)
        if check or not recipe.by_class:
            _compare(block, recipe)
    return new


def families() -> list[tuple[str, str, str]]:
    """What is known, one row for each kind of block: its source, its classes or attributes, and what is in it.

    Example:
        >>> [row for row in families() if "RepMixer" in row[1]]
        [('timm', 'fastvit.RepMixer', 'RepMixer: ``x + γ·(mixer(x) - norm(x))``.')]
    """
    rows = []
    for recipe in RECIPES:
        source = recipe.fold.__module__.rpartition(".")[2]
        names = [".".join(name.split(".")[-2:]) for name in recipe.names]
        rows.append((source, ", ".join(names), (recipe.fold.__doc__ or "").partition("\n")[0]))
    return rows


def _name(block: nn.Module) -> str:
    return f"{type(block).__module__}.{type(block).__qualname__}"


def _folded(block: nn.Module, recipe: Recipe) -> nn.Module | None:
    """What the recipe gives, for the weights that evaluation mode computes; new parts are in the block's mode."""
    flags = {part: part.training for part in block.modules()}
    try:
        for part in flags:
            part.training = False
        new = recipe.fold(block)
    except (AttributeError, TypeError, StopIteration) as error:
        raise UnsupportedError(f"{_name(block)} is built otherwise than we know it: {error}") from error
    finally:
        for part, flag in flags.items():
            part.training = flag
    for part in () if new is None else new.modules():
        part.training = flags.get(part, block.training)
    return new


def _refuse_watched(block: nn.Module, new: nn.Module) -> None:
    if "forward" in vars(block):
        raise UnsupportedError(f"the forward of {_name(block)} was replaced on the instance")
    kept = set(new.modules())
    for name, part in block.named_modules():
        if part is not block and part not in kept and is_altered(part):
            raise UnsupportedError(f"{name} in it has a hook or another forward, which the fold would lose; remove it")


def _refuse_non_finite(block: nn.Module, new: nn.Module) -> None:
    old = set(block.parameters())
    for name, values in new.named_parameters():
        if values not in old and not values.is_meta and not torch.isfinite(values).all():
            raise FoldMismatchError(
                f"the fold of {_name(block)}: expected a finite {name}, received values that are not finite in "
                f"{values.dtype}; mend the block's parameters and norm statistics, or fold in float32"
            )


def _compare(block: nn.Module, recipe: Recipe) -> None:
    """Run the block and its fold in float64, on one input of size one and one so large that no bias shows."""
    if next(block.parameters()).is_meta:
        if recipe.by_class:
            return
        raise UnsupportedError(f"{_name(block)} is on the meta device, so that nothing can prove what it computes")
    original = _in_float64(block)
    x = _input(original, recipe.reads)
    x[1] *= 100
    expected = _run(_name(block), original, x)
    received = _run(f"{_name(block)} with its fold in it", recipe.fold(original), x)
    shapes = [[tuple(output.shape) for output in outputs] for outputs in (expected, received)]
    if shapes[0] != shapes[1]:
        raise FoldMismatchError(
            f"the fold of {_name(block)}: expected outputs of shapes {shapes[0]}, received {shapes[1]}; fold with "
            "blocks=False"
        )
    for a, b in (pair for outputs in zip(expected, received) for pair in zip(*outputs)):
        allowed, error = TOLERANCE * float(a.abs().max()), float((a - b).abs().max())
        if not error <= allowed:
            raise FoldMismatchError(
                f"the fold of {_name(block)} differs from the block: expected at most {allowed:.1e}, received "
                f"{error:.1e}; fold with blocks=False"
            )


def _run(what: str, module: Any, x: Tensor) -> list[Tensor]:
    try:
        return list(_tensors(module(x.clone())))
    except Exception as error:
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UnsupportedError(f"{what} cannot be run alone ({why})") from error


def _in_float64(block: nn.Module) -> Any:
    """A copy in evaluation mode that nobody watches, made without calling the block's own ``eval``."""
    try:
        copied = copy.deepcopy(block).double()
    except Exception as error:
        raise UnsupportedError(f"{_name(block)} cannot be copied ({type(error).__name__}: {error})") from error
    for part in copied.modules():
        part.training = False
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return copied


def _input(block: nn.Module, reads: tuple[str, ...]) -> Tensor:
    """A random input for what reads the block's input: images, sequences, vectors or tokens."""
    readers = [block._modules.get(name) for name in reads] or [block]
    parts = (part for reader in readers if reader is not None for part in reader.modules())
    part = next((part for part in parts if channels_read(part)), None)
    if part is None:
        raise UnsupportedError(f"{_name(block)} does not tell how many channels it reads")
    channels = channels_read(part)
    # Large enough for every window, and of another size in each dimension.
    convs: list[Any] = [module for module in block.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d))]
    size = 1 + max([12, *(d * (k - 1) for conv in convs for k, d in zip(conv.kernel_size, conv.dilation))])
    if isinstance(part, nn.Linear):
        shape = (2, size, channels)
    elif isinstance(part, nn.BatchNorm1d):
        shape = (2, channels)
    elif isinstance(part, nn.Conv1d):
        shape = (2, channels, size)
    else:
        shape = (2, channels, size, size + 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(next(block.parameters()).device)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for item in output:
            yield from _tensors(item)
