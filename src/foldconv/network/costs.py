"""`summary`: what each layer costs while training and after folding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.convolutions import PLAIN, TRANSPOSED
from ..errors import shown
from ..layers import BranchedConv, ComposedConv, Foldable, FoldableBlock, NormPlace
from .table import align, some
from .tree import evaluation, first_names, restore, unwrapped, usual_conditions, walk

_BRANCHED = (BranchedConv, FoldableBlock)


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer. Multiply-adds are per forward of the given input; None when the layer did not run."""

    name: str
    layer: str
    method: str
    parameters_training: int
    parameters_folded: int
    macs_training: int | None
    macs_folded: int | None
    foldable: bool = False


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summary` found; print it for a table. Totals have the rows' names."""

    rows: tuple[Row, ...]
    parameters_training: int
    parameters_folded: int
    macs_training: int | None
    macs_folded: int | None
    input_shape: tuple[int, ...] | None
    left: tuple[str, ...] = ()
    """Names of the convolutions that are not foldable; `plan` says why."""

    def __str__(self) -> str:
        head = ("layer", "type", "method", "parameters", "folded", "multiply-adds", "folded")
        rows: list[tuple[str, ...]] = [head]
        for r in self.rows:
            numbers = (r.parameters_training, r.parameters_folded, r.macs_training, r.macs_folded)
            rows.append((r.name or "(root)", r.layer, r.method, *map(_thousands, numbers)))
        totals = (self.parameters_training, self.parameters_folded, self.macs_training, self.macs_folded)
        rows.append(("whole network", "", "", *map(_thousands, totals)))
        if self.input_shape is None:
            note = "multiply-adds unknown: pass inputs=, a tensor or a shape the network accepts"
        else:
            shape = "×".join(map(str, self.input_shape))
            note = f"multiply-adds of convolutions and linear layers for one input of {shape}"
        if self.left:
            convs = len(self.left) + sum(row.foldable for row in self.rows)
            note += f"\n{len(self.left)} of {convs} convolutions are left as they are: {some(list(self.left))}"
            note += "; foldconv.plan says why"
        return f"{align(rows)}\n{note}"


def summary(model: nn.Module, inputs: Tensor | Sequence[int] | None = None) -> Summary:
    """Parameters and multiply-adds of each convolution and linear layer, while training and after folding.

    Args:
        model: plain or expanded; nothing in it changes.
        inputs: an input tensor, or its shape with the batch first. By default the shape is guessed: timm's
            ``default_cfg``, else 224 samples per dimension and the first convolution's channels.

    Returns:
        A `Summary` with one row per layer that has a kernel, and totals over the whole network. Composing a kernel
        counts as multiply-adds of training, once per forward, whatever the batch.

    Example:
        >>> import foldconv
        >>> net = foldconv.expand(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False)), "doconv")
        >>> print(foldconv.summary(net, (1, 1, 8, 8)))
        layer          type      method  parameters  folded  multiply-adds  folded
        ─────────────  ────────  ──────  ──────────  ──────  ─────────────  ──────
        0              DOConv2d  doconv         153      72          5,256   4,608
        whole network                           153      72          5,256   4,608
        multiply-adds of convolutions and linear layers for one input of 1×1×8×8
    """
    model = unwrapped(model)
    layers = _layers(model)
    x = inputs if isinstance(inputs, Tensor) else _example(model, inputs)
    counted = None if x is None else _count(model, x, guessed=inputs is None)
    rows = []
    places = {place.link[0]: place for _, place in walk(model) if isinstance(place, NormPlace)}
    for module, name in layers.items():
        training = sum(p.numel() for _, p in module.named_parameters())
        folded = _folded_parameters(module, places.get(module))
        macs = counted.get(name) if counted is not None else None
        method = module.method.name if isinstance(module, Foldable) and module.method else ""
        costs = macs or (None, None)
        rows.append(Row(name, type(module).__name__, method, training, folded, *costs, isinstance(module, Foldable)))
    total = sum(p.numel() for p in model.parameters())
    saved = sum(row.parameters_training - row.parameters_folded for row in rows)
    return Summary(
        rows=tuple(rows),
        parameters_training=total,
        parameters_folded=total - saved,
        macs_training=None if counted is None else sum(r.macs_training or 0 for r in rows),
        macs_folded=None if counted is None else sum(r.macs_folded or 0 for r in rows),
        input_shape=None if counted is None or x is None else tuple(x.shape),
        left=tuple(name or "(root)" for m, name in layers.items() if not isinstance(m, (Foldable, nn.Linear))),
    )


@usual_conditions()
def _folded_parameters(module: nn.Module, place: NormPlace | None) -> int:
    if not isinstance(module, Foldable):
        return sum(p.numel() for p in module.parameters())
    with torch.no_grad():
        kernel, norm = module.to_kernel(), None
        if place is not None:
            kernel, norm = restore(place, kernel)
        parts = [module.realize(kernel), *([] if norm is None else [norm])]
    return sum(p.numel() for part in parts for p in part.parameters())


def _example(model: nn.Module, shape: Sequence[int] | None) -> Tensor | None:
    """Zeros of the given shape, or of a guessed one; None when there is nothing to guess from."""
    first: Any = next((m for m in model.modules() if isinstance(m, PLAIN)), None)
    text = isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence)
    if shape is not None and (text or not all(hasattr(size, "__index__") and size > 0 for size in shape)):
        raise TypeError(f"inputs: expected a tensor or a shape, received {shown(shape)}")
    if shape is None and first is None:
        return None
    if shape is None:
        config: Any = getattr(model, "default_cfg", None) or {}
        guess = config.get("input_size") or (first.in_channels, *(224,) * len(first.kernel_size))
        shape = (1, *guess)
    parameter = next(model.parameters(), torch.zeros(()))
    return torch.zeros(tuple(shape), dtype=parameter.dtype, device=parameter.device)


def _layers(model: nn.Module) -> dict[nn.Module, str]:
    return {m: name for m, name in first_names(model).items() if isinstance(m, (Foldable, nn.Linear, *PLAIN))}


def _count(model: nn.Module, x: Tensor, guessed: bool) -> dict[str, tuple[int, int]] | None:
    """Multiply-adds of each layer, ``(training, folded)``, by running the network once in evaluation mode."""
    with torch.no_grad(), evaluation(model) as running:
        layers = _layers(running)
        try:
            counted = _count_running(running, x, layers)
        except Exception:
            # A guessed shape may not fit the network, and then the costs are unknown; a given one has to.
            if not guessed:
                raise
            return None
    return {name: counted[layer] for layer, name in layers.items() if layer in counted}


def _count_running(model: nn.Module, x: Tensor, layers: dict[nn.Module, str]) -> dict[nn.Module, tuple[int, int]]:
    counted: dict[nn.Module, tuple[int, int]] = {}

    def see(module: Any, args: tuple, output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            folded = output.numel() * module.in_features
        elif isinstance(module, tuple(TRANSPOSED.values())):
            # Every input sample meets every tap: count from the input.
            conv: Any = module
            folded = args[0].numel() * math.prod(conv.kernel_size) * conv.out_channels // conv.groups
        else:
            weight: Tensor = (module.to_kernel(None) if isinstance(module, Foldable) else module).weight
            folded = output.numel() * math.prod(weight.shape[1:])
        # A branch costs what it costs while training; its owner, seen after its branches, is what is left.
        owner = branches.get(module)
        training = 0 if isinstance(module, _BRANCHED) else folded
        if isinstance(module, ComposedConv) and not module.transposed:
            # Its fold may have more groups than the convolution it trains as.
            with usual_conditions():
                plain: Any = module.realize(module.to_kernel(None))
            folded = output.numel() * math.prod(plain.weight.shape[1:])
        if isinstance(module, Foldable):
            training += module.composition_cost()
        key, folded = (module, folded) if owner is None else (owner, 0)
        before = counted.get(key, (0, 0))
        counted[key] = (before[0] + training, before[1] + folded)

    owners = [module for module in layers if isinstance(module, _BRANCHED)]
    branches = {m: owner for owner in owners for m in owner.modules() if isinstance(m, (ComposedConv, *PLAIN))}
    handles = [module.register_forward_hook(see) for module in [*layers, *branches]]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return counted


def _thousands(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"
