"""`import_checkpoint`: published checkpoints of the original repositories, one file per repository."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor, nn

from ..errors import UnsupportedError, nearest
from ._reading import is_safetensors as is_safetensors
from ._reading import read_checkpoint as read_checkpoint
from ._reading import read_safely as read_safely
from .do_conv import from_do_conv

_SOURCES: dict[str, Callable[[dict[str, Tensor], nn.Module, str], nn.Module]] = {"do-conv": from_do_conv}


def import_checkpoint(path: str | os.PathLike[str], model: nn.Module, source: str) -> nn.Module:
    """The model of a published checkpoint as a foldconv model.

    Args:
        path: a ``.pth``, ``.pth.tar`` or ``.safetensors`` file. Pickled files are read with ``weights_only=True``, so
            no code in them runs; ``module.`` prefixes and a wrapping ``state_dict`` or ``model`` entry are understood.
        model: the *plain* network with the original's module names; it is left as it is.
        source: the repository it comes from; ``"do-conv"``.

    Returns:
        A new model: `model` with the layers expanded as the checkpoint says, computing what the original computes.

    Raises:
        CheckpointError: for a file that is missing, truncated, hostile, or does not fit; nothing is half-loaded.
        UnsupportedError: for an unknown source.
    """
    if source not in _SOURCES:
        raise UnsupportedError(
            f"unknown checkpoint source {source!r}{nearest(source, _SOURCES)}; expected one of: {', '.join(_SOURCES)}"
        )
    return _SOURCES[source](read_checkpoint(path), model, str(path))
