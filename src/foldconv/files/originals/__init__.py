"""`import_checkpoint`: published checkpoints of the original repositories, one file per repository."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from ..._arguments import expect_path
from ...errors import CheckpointError, UnsupportedError, unknown
from ...network.tree import expect_module
from ..archives import count_records
from ..folders import read_content
from ..weights import take
from . import acnet, dbb, dgconv, orepa, repvgg
from ._blocks import Blocks, owners
from .do_conv import from_do_conv

_BLOCKS: dict[str, Blocks] = {
    "orepa": orepa.BLOCKS,
    "dbb": dbb.BLOCKS,
    "repvgg": repvgg.BLOCKS,
    "acnet": acnet.BLOCKS,
    "dgconv": dgconv.BLOCKS,
}
SOURCES = ("do-conv", *_BLOCKS)
"""What `import_checkpoint` can read, by name."""
_MOST = 100
"""Tensors in a file for each of the plain network's: branches, averages and an optimizer's make less than 60."""


def import_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    source: str,
    *,
    weights: str = "auto",
    prefix: str | None = None,
    **options: Any,
) -> nn.Module:
    """The model of a published checkpoint as a foldconv model.

    Args:
        path: a file or folder that `foldconv.read_weights` reads; no code in it is run.
        model: the *plain* network with the original's module names (`foldconv.zoo` has the originals' architectures);
            it is left as it is. Where the original has a block of branches, a module of that name with one
            convolution and its norm.
        source: the repository it comes from: ``"do-conv"``, ``"orepa"``, ``"dbb"``, ``"repvgg"``, ``"acnet"`` or
            ``"dgconv"``.
        weights: the file's entry to take, as of `foldconv.read_weights`.
        prefix: what stands before the original's names in it; None: what leaves most of the model's names.
        options: of the method, where no checkpoint tells them: ``sort=True`` for DGConvs that sort their gates.

    Returns:
        A new model: `model` with the layers expanded as the checkpoint says, computing what the original computes; for
        a checkpoint that the original's own code has folded, ``foldconv.fold(model, batchnorm=True)`` with its values.

    Raises:
        CheckpointError: for a file that is missing, truncated, hostile, of another source, or does not fit, with the
            missing, surplus and misshapen keys; nothing is half-loaded.
        UnsupportedError: for an unknown source or option, or a network whose layers cannot be expanded.

    Example:
        >>> import foldconv, tempfile, torch
        >>> plain = foldconv.zoo.RepVGG((1, 1, 1, 1), (0.125, 0.125, 0.125, 0.125), num_classes=10)
        >>> state = foldconv.fold(plain, batchnorm=True).state_dict()
        >>> published = {name.replace(".conv.", ".rbr_reparam."): tensor for name, tensor in state.items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(published, f"{folder}/RepVGG-deploy.pth")
        ...     net = foldconv.import_checkpoint(f"{folder}/RepVGG-deploy.pth", plain, source="repvgg")
        >>> net.stage0.conv
        Conv2d(3, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
    """
    expect_module(model)
    expect_path(path)
    if source not in SOURCES:
        raise UnsupportedError(unknown("checkpoint source", source, SOURCES))
    records, own = count_records(path), len(model.state_dict())
    if records > 1000 + _MOST * own:  # seconds, to read what cannot fit
        raise CheckpointError(
            f"{path}: holds {records:,} records, far more than {type(model).__name__} with {own} tensors could take; "
            "is it the checkpoint of this network?"
        )
    taken = take(read_content(path), path, weights=weights, prefix=prefix, partly=model)
    taken.tell()
    tensors = taken.tensors
    recognized = {name for name, blocks in _BLOCKS.items() if blocks.recognize(tensors)[0]}
    recognized |= {"do-conv"} if owners("W", tensors) else set()
    if recognized and source not in recognized:
        raise CheckpointError(
            f"{path}: has no layer of {source!r}, but its keys are those of {' and '.join(sorted(recognized))}; "
            f"pass source={min(recognized)!r}"
        )
    if source in _BLOCKS:
        return _BLOCKS[source](tensors, model, str(path), options)
    if options:
        raise UnsupportedError(f"source {source!r} takes no options, received {options}")
    return from_do_conv(tensors, model, str(path))
