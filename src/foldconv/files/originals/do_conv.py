"""Checkpoints of yangyanli/DO-Conv (PyTorch).

Its layers store ``W (out, in/g, S)``, ``D (in, k, S)`` and, frozen, the tiled identity ``d_diag (in, k, S)``
(``D_diag`` in the first version); one-tap kernels store ``W (out, in/g, 1)`` alone. The mapping to ours:

    weight = W[:, :, :k]     weight_extra = W[:, :, k:]     D = D + d_diag - [I, 0]

Its grouped layers pair kernels with D by a reshape that is right only when out = groups; elsewhere the function is
another than the paper's. What has to survive is the trained function, so such a layer is imported folded: its
composed kernel becomes ``weight``, and D starts again from zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...layers.foldable import plain_class
from ...methods import DOConv, Method
from ...network.expand import expanded_layers, put_in
from ...network.tree import copy_of
from ..native import load_exactly
from ..reading import check_floating

_DIAGONALS = ("d_diag", "D_diag")


def from_do_conv(tensors: dict[str, Tensor], model: nn.Module, path: str) -> nn.Module:
    """The DO-Conv network of a checkpoint around the plain `model`."""
    work = copy_of(model)
    modules = dict(work.named_modules())
    left, ours = dict(tensors), {}
    chosen: dict[str, tuple[nn.Module, Method]] = {}
    constant = not any(key.endswith(_DIAGONALS) for key in tensors)
    for key in tensors:
        name, _, last = key.rpartition(".")
        if last != "W":
            continue
        conv: Any = modules.get(name)
        if plain_class(conv) is not nn.Conv2d:
            raise CheckpointError(
                f"{path}: holds a DO-Conv layer {name!r}, but {type(model).__name__} has "
                f"{'no module' if conv is None else type(conv).__name__} there; expected an nn.Conv2d of that name"
            )
        prefix = key[: -len("W")]
        parts = {part: left.pop(prefix + part, None) for part in ("W", "D", *_DIAGONALS)}
        check_floating({prefix + part: value for part, value in parts.items() if value is not None}, path)
        values, multiplier = _layer(parts, conv, f"{path}: {name or 'the root'}", constant)
        if multiplier is not None:
            chosen[name] = conv, DOConv(depth_multiplier=multiplier)
        ours.update({prefix + part: value for part, value in values.items()})
    if not ours:
        raise CheckpointError(f"{path}: holds no DO-Conv layer (no key ends in '.W'); is it a folded or plain network?")
    work = put_in(work, expanded_layers(chosen, {}, "paper"))
    load_exactly(work, left | ours, path)
    return work


def _layer(
    parts: dict[str, Tensor | None], conv: Any, where: str, constant: bool
) -> tuple[dict[str, Tensor], int | None]:
    """Our parameters of one layer and its depth multiplier (None: a plain convolution).

    `constant`: no layer of the checkpoint has the tiled identity, which nobody trains and some leave out.
    """
    W, D = parts["W"], parts["D"]
    assert W is not None
    shape, taps = tuple(conv.weight.shape), math.prod(conv.kernel_size)
    if D is None:
        if tuple(W.shape) not in (shape, (*shape[:2], taps)):
            raise CheckpointError(
                f"{where}: expected W of {math.prod(shape)} values for a kernel {shape}, received {tuple(W.shape)}"
            )
        if taps > 1:
            raise CheckpointError(f"{where}: has W of {taps} taps but no D; is the checkpoint complete?")
        return {"weight": W.reshape(shape)}, None
    multiplier = W.shape[-1] if W.dim() else 0
    expected = ((*shape[:2], multiplier), (conv.in_channels, taps, multiplier))
    if (tuple(W.shape), tuple(D.shape)) != expected or multiplier < taps:
        raise CheckpointError(
            f"{where}: expected W {expected[0]} and D {expected[1]} with at least {taps} taps for a kernel {shape}, "
            f"received {tuple(W.shape)} and {tuple(D.shape)}"
        )
    diagonal = next((parts[d] for d in _DIAGONALS if parts[d] is not None), None)
    if diagonal is None:
        if not constant:
            raise CheckpointError(f"{where}: has D but neither d_diag nor D_diag; is the checkpoint complete?")
        tiled = torch.eye(taps, dtype=D.dtype).repeat(1, multiplier // taps)
        diagonal = nn.functional.pad(tiled, (0, multiplier % taps)).expand(D.shape)
    if diagonal.shape != D.shape:
        raise CheckpointError(f"{where}: expected d_diag {tuple(D.shape)}, received {tuple(diagonal.shape)}")
    if conv.groups == 1 or conv.out_channels == conv.groups:
        # Where d_diag is our identity the difference is zero and D comes through bit for bit; elsewhere it may need
        # more digits than D has, and loading rounds once.
        residual = D.double() + (diagonal.double() - torch.eye(taps, multiplier, dtype=torch.float64))
        values = {"weight": W[..., :taps].reshape(shape), "D": residual}
    else:
        kernel = _original_kernel(W.double(), D.double() + diagonal.double(), conv.groups)
        values = {"weight": kernel.reshape(shape), "D": torch.zeros_like(D)}
    if multiplier > taps:
        values["weight_extra"] = W[..., taps:].contiguous()
    return values, multiplier


def _original_kernel(W: Tensor, full: Tensor, groups: int) -> Tensor:
    """The original's composition for groups: W is read as ``(out/groups, in, S)``, whatever its order was."""
    out, per_group, multiplier = W.shape
    paired = W.reshape(out // groups, per_group * groups, multiplier)
    kernel = torch.matmul(paired.transpose(0, 1), full.transpose(1, 2)).transpose(0, 1)  # (out/groups, in, k)
    return kernel.reshape(out, per_group, -1)
