"""`fold`: every foldable layer becomes the plain convolution that computes the same, and the sameness is checked."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import expect, expect_flags
from ..algebra import Kernel, kernel_of, norms
from ..algebra.convolutions import PLAIN
from ..errors import FoldMismatchError, UnsupportedError
from ..layers import ComposedConv, Foldable, NormPlace
from ..layers.branched import runs_its_features
from ..layers.foldable import realize_like
from ._blocks import blocks_folded
from ._computed import bake, is_computed, refuse_unknown
from ._fusers import guard_fusers
from ._hooks import read_by_hooks
from ._sources import reads_by_name
from ._subclasses import as_plain
from ._whole import whole_difference
from .dataflow import DataFlow
from .table import some
from .tree import (
    carry_over,
    changeable,
    copy_of,
    first_names,
    quiet_copy,
    replace_modules,
    restore,
    usual_conditions,
    walk,
)

_LOG = logging.getLogger(__name__)
TOLERANCE = 1e-10
"""Largest difference, relative to the output's largest value, that a checked fold may have in float64."""


def fold(
    model: nn.Module,
    *,
    batchnorm: bool = False,
    blocks: bool | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
    check: bool = True,
) -> nn.Module:
    """The model with every foldable layer as a plain convolution.

    The evaluation-mode function is folded, whatever mode the model is in (and stays in). Kernels are composed in
    float64 and cast last, so half-precision models fold as well as the type allows.

    Args:
        model: any module; one with nothing to fold comes back unchanged.
        batchnorm: also absorb each batch norm into the convolution before it, plain or foldable, where data flow
            proves that the norm is the only consumer of the convolution. What stays is logged in one line, and why.
        blocks: also fold the blocks of other libraries that `foldconv.blocks` knows (timm's RepVGG, for one); True
            raises where one cannot be folded exactly, otherwise it is left and logged. By default so with
            ``batchnorm=True``, and in a network without foldable layers; what was expanded folds back into the network
            that it was, with its state dict keys, and its blocks with it when it is folded again.
        example_inputs: what the model is called with, as in `expand`: for networks whose data flow only a run shows.
            Checked with them, the folded model as a whole has to give the same.
        inplace: change `model` itself; by default a copy is changed.
        check: run each layer and its fold on random input in float64 and compare.

    Raises:
        FoldMismatchError: naming the layer, or the part of the output, when a check fails or a kernel holds NaN or
            infinity.
        UnsupportedError: when a layer has no exact fold, its forward was replaced on the instance, or the model
            cannot be copied.
        In every case `model` is as it was.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> foldconv.fold(foldconv.expand(net, "doconv"), batchnorm=True)
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    expect_flags(batchnorm=batchnorm, inplace=inplace, check=check)
    expect("blocks", blocks, (bool, type(None)), "True, False or None")
    model = changeable(model)
    for name, module in model.named_modules():
        if "_hf_hook" in vars(module) and isinstance(module, (Foldable, *PLAIN)):
            raise UnsupportedError(
                f"{name or 'the root'}: accelerate moves its weights at each forward; fold before dispatching or "
                "offloading, or after accelerate.hooks.remove_hook_from_submodules(model)"
            )
    options = (batchnorm, blocks, example_inputs, check)
    if check and example_inputs is not None:
        folded = _folded(copy_of(model), *options)
        if found := whole_difference(model, folded, example_inputs):
            raise FoldMismatchError(
                f"example_inputs: the folded {type(model).__name__} gives another output{found}; its forward uses more "
                "of its layers than what they give, such as the number of their parameters: compute that outside of it"
            )
        if not inplace:
            return folded
    return _folded(model if inplace else copy_of(model), *options)


def _folded(work: nn.Module, batchnorm: bool, blocks: bool | None, example_inputs: Any, check: bool) -> nn.Module:
    """The model itself, folded, its blocks too."""
    strict = blocks is True
    if blocks is None:
        blocks = batchnorm or not any(isinstance(m, Foldable) for m in work.modules())
    if blocks:
        with blocks_folded(work, strict=strict, check=check) as rest:
            return _fold(rest, batchnorm, example_inputs, check)
    return _fold(work, batchnorm, example_inputs, check)


def _fold(work: nn.Module, batchnorm: bool, example_inputs: Any, check: bool) -> nn.Module:
    """The model itself, changed, once everything has been computed and checked."""
    pairs = _pairs(work, example_inputs) if batchnorm else {}
    places = {place.link[0]: place for _, place in walk(work) if isinstance(place, NormPlace)}
    refuse_strays(work)
    _refuse_read(work)
    replacements: dict[nn.Module, nn.Module] = {}
    folded: list[tuple[nn.Module, nn.Module]] = []
    for name, layer in walk(work):
        if layer in replacements or not (isinstance(layer, Foldable) or layer in pairs):
            continue
        norm, place = pairs.get(layer), places.get(layer)  # pyright: ignore[reportArgumentType]
        name = name or "the root"
        try:
            plain, restored = _fold_one(name, layer, norm, None if batchnorm else place, check)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error}") from None
        replacements[layer] = plain
        if norm is None:
            folded.append((layer, plain))
        else:
            replacements[norm] = norms.after_norm(norm)
        if place is not None:
            replacements[place] = place.rest if restored is None else restored
    for old, new in replacements.items():
        if isinstance(old, (Foldable, *PLAIN)):
            carry_over(old, new)
        new.training = old.training
    _tie(folded)
    return guard_fusers(replace_modules(work, replacements), fold)


def _pairs(model: nn.Module, example_inputs: Any) -> dict[nn.Module, nn.Module]:
    """Each convolution with the norm that it can absorb; how its weight is computed is no question here."""
    computed = [name for name, module in walk(model) if _folds(module) and is_computed(module)]
    twin = copy_of(model) if computed else model
    theirs, ours = dict(walk(twin)), dict(walk(model))
    for name in computed:
        bake(theirs[name])
    flow, names = DataFlow(twin, example_inputs), first_names(twin)
    # Norms that only know the batch stay; `kernel_of` refuses them and the user did not ask for them one by one.
    pairs = {conv: norm for conv, norm in flow.pairs.items() if getattr(norm, "running_var", None) is not None}
    left = [name for norm, name in names.items() if norms.is_norm(norm) and norm not in pairs.values()]
    if left:
        why = {names[conv]: flow.why(conv) for conv in names if _folds(conv) and conv not in pairs}
        why |= {names[c]: f"{names[n]} keeps no running statistics" for c, n in flow.pairs.items() if c not in pairs}
        alike = {reason: [name or "the root" for name in why if why[name] == reason] for reason in why.values()}
        reasons = [f"{some(convs)}: {reason}" for reason, convs in alike.items()]
        _LOG.warning(
            "%d of %d batch norms stay: %s; %s",
            *(len(left), len(left) + len(set(pairs.values())), some(left), some(reasons, "; ", most=3)),
        )
    return {ours[names[conv]]: ours[names[norm]] for conv, norm in pairs.items()}


def refuse_strays(model: nn.Module) -> None:
    """Refuse places of norms whose layer is not in the model.

    Raises:
        UnsupportedError: naming the place.
    """
    there = set(model.modules())
    for name, module in walk(model):
        if isinstance(module, NormPlace) and module.link[0] not in there:
            raise UnsupportedError(
                f"{name or 'the root'}: the norm that was here is inside a {type(module.link[0]).__name__} that is not "
                "in this model; copy or cut the network as a whole, or fold it before"
            )


def _refuse_read(model: nn.Module) -> None:
    """Refuse foldable layers whose ``weight`` a forward or a hook names, for folding puts the whole kernel there."""
    modules = list(model.modules())
    by_name = set().union(*(reads_by_name(m) for m in modules if not isinstance(m, Foldable)))
    for who, read, remedy in (
        ("the forward", by_name, "expand leaves such a layer plain"),
        ("a hook", set().union(*map(read_by_hooks, modules)), "remove it before"),
    ):
        for name, layer in walk(model):
            if isinstance(layer, Foldable) and layer in read:
                raise UnsupportedError(
                    f"{name or 'the root'}: {who} reads its weight, where the composed kernel will be, so the folded "
                    f"network would compute something else; {remedy}"
                )


def _folds(module: nn.Module) -> bool:
    return isinstance(module, (Foldable, *PLAIN))


@usual_conditions()
def _fold_one(
    name: str, layer: nn.Module, norm: nn.Module | None, place: NormPlace | None, check: bool
) -> tuple[nn.Module, nn.Module | None]:
    """The plain convolution, with `norm` absorbed; and the norm to put back into `place`, if there is one."""
    for part, module in layer.named_modules():
        if "forward" in vars(module):  # accelerate's hooks do so, for one
            whose = f"the forward of its {part}" if part else "its forward"
            raise UnsupportedError(f"{whose} was replaced on the instance; remove that before folding")
    restored = None
    with torch.no_grad():
        refuse_unknown(layer)
        computed = is_computed(layer)
        # What evaluation mode computes, its own weights too: here in float64 and below in the layer's type.
        exact = quiet_copy(layer, torch.float64) if check or computed else layer
        original = quiet_copy(layer, torch.float64) if check and computed else exact
        exact = bake(exact) if computed else exact
        kernel = composed = exact.to_kernel() if isinstance(exact, Foldable) else kernel_of(as_plain(exact))
        if norm is not None:
            kernel = kernel.scale(*norms.scale_and_shift(norm))
        for part, values in (("kernel", kernel.weight), ("bias", kernel.bias)):
            _refuse_non_finite(name, part, values, "the layer's parameters or norm statistics hold NaN or infinity")
        # Tensors on the meta device have no values to compare.
        if check and not kernel.weight.is_meta:
            _compare(name, original, exact, norm, composed, kernel)
        if place is not None:
            kernel, restored = restore(place, kernel)
        source = bake(quiet_copy(layer)) if computed else layer
        plain = source.realize(kernel) if isinstance(source, Foldable) else realize_like(as_plain(source), kernel)
        for part, values in plain.named_parameters():
            _refuse_non_finite(name, part, values, f"the folded value does not fit {values.dtype}; fold in float32")
    return plain, restored


def _refuse_non_finite(name: str, part: str, values: Tensor | None, why: str) -> None:
    # A sum that is finite has finite terms, and takes a tenth of the time.
    if values is None or values.is_meta or torch.isfinite(values.sum()):
        return
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise FoldMismatchError(f"{name}: expected a finite {part}, found {bad} of {values.numel()} not finite; {why}")


def _compare(
    name: str, original: nn.Module, exact: nn.Module, norm: nn.Module | None, composed: Kernel, kernel: Kernel
) -> None:
    """Run the layer (by its features, and as it is called) and its fold on one random input.

    Args:
        name: the layer's.
        original: the layer in float64, nobody watching.
        exact: the same with its computed weights baked, which is where `composed` comes from.
        norm: what `kernel` has absorbed.
        composed: the layer's kernel.
        kernel: the same followed by the norm.
    """
    x = _random_input(kernel)
    # What takes the layer's place may be more than the kernel's own convolution (groups, permutations).
    plain = exact.realize(kernel) if isinstance(exact, Foldable) else kernel.to_module()
    folds = [kernel(x), plain(x)]
    outputs = [exact.feature_forward(x)] if isinstance(exact, Foldable) and not runs_its_features(exact) else []
    if isinstance(original, ComposedConv) and original is exact:
        original.compose_no_more(composed)
    outputs.append(original(x))
    if norm is not None:
        before = quiet_copy(norm, torch.float64)
        folds = [norms.after_norm(before)(fold) for fold in folds]
        outputs = [before(output) for output in outputs]
    for expected, received in itertools.product(outputs, folds):
        if expected.shape != received.shape:
            raise FoldMismatchError(
                f"{name}: expected an output of shape {tuple(expected.shape)}, the fold gives {tuple(received.shape)}; "
                "please report this layer"
            )
        error = float((expected - received).abs().max())
        allowed = TOLERANCE * float(expected.abs().max())
        if not error <= allowed:
            raise FoldMismatchError(
                f"{name}: the fold of {type(exact).__name__} differs from the layer: expected at most {allowed:.1e}, "
                f"received {error:.1e}; a subclass that overrides forward must also override to_kernel"
            )


def _random_input(kernel: Kernel) -> Tensor:
    """One sample of the smallest size at which every tap meets a value and every window at a border is seen."""
    generator = torch.Generator().manual_seed(0)
    shapes = zip(kernel.size, kernel.dilation, kernel.stride, kernel.padding)
    size = [_smallest(*shape, kernel.transposed) for shape in shapes]
    x = torch.randn(1, kernel.in_channels, *size, generator=generator, dtype=torch.float64)
    return x.to(kernel.weight.device)


def _smallest(k: int, d: int, s: int, padding: tuple[int, int], transposed: bool) -> int:
    """That size in one dimension, from its taps, dilation, stride and padding.

    >>> _smallest(3, 1, 1, (1, 1), False), _smallest(3, 1, 2, (1, 1), False), _smallest(7, 1, 2, (3, 3), False)
    (2, 3, 5)
    """
    before, after = padding
    if transposed:  # the first and the last tap reach beyond what is cropped
        return max(1, math.ceil(max(before, after) / s)) + 1
    for size in itertools.count(max(before, after, 0) + 1):  # a reflection needs more values than it repeats
        last, rest = divmod(size + before + after - d * (k - 1) - 1, s)
        # Two windows at least, and the last one ends where the padding ends.
        if last >= 1 and not rest and all(_meets(j * d - before, s, last, size) for j in range(k)):
            return size
    raise AssertionError("unreachable")


def _meets(start: int, step: int, last: int, size: int) -> bool:
    """Is one of ``start + n·step``, n from 0 to `last`, a position of an input of this size?"""
    n = max(0, -(start // step))
    return n <= last and start + n * step < size


def _tie(folded: list[tuple[nn.Module, nn.Module]]) -> None:
    """What layers composed from the very same parameters becomes one parameter again, as in tied convolutions."""
    tied: dict[tuple, nn.Parameter] = {}
    for layer, plain in folded:
        for part, own in plain.named_parameters():
            sources = [id(p) for name, p in layer.named_parameters() if (name == "bias") == (part == "bias")]
            twin = tied.setdefault((part, own.shape, *sources), own)
            if sources and twin is not own and not own.is_meta and torch.equal(twin, own):
                plain.register_parameter(part, twin)
