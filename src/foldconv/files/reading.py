"""Reading other people's checkpoint files without running their code."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .archives import check_archive, is_archive

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIX = "module."


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, unwrapped, without ``module.`` prefixes.

    Raises:
        CheckpointError: for a file that is missing, unreadable, would run code, or holds no tensors.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"module.weight": torch.ones(1)}}, f"{folder}/net.pth")
        ...     read_checkpoint(f"{folder}/net.pth")
        {'weight': tensor([1.])}
    """
    content = read_safely(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(content).__name__} without any")
    if all(name.startswith(_PREFIX) for name in tensors):
        tensors = {name[len(_PREFIX) :]: tensor for name, tensor in tensors.items()}
    return tensors


def read_safely(path: str | os.PathLike[str]) -> Any:
    """What a checkpoint file holds: tensors and plain values; a file that would run code is refused.

    Raises:
        CheckpointError: for a file that is missing, damaged (checksums are compared) or holds anything else.
    """
    if is_safetensors(path):
        return read_safetensors(path)
    if is_archive(path):
        check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "nsupported" in line), "it holds more than tensors")
        raise CheckpointError(
            f"{path}: refused, since reading it would run code or it is damaged ({reason.strip()}); "
            "save its state_dict again with plain tensors only"
        ) from None
    except Exception as error:
        # torch goes on with advice; its first sentence is the reason.
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason}); is it whole?") from None


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """By content, since a name proves nothing: eight bytes of length, then JSON.

    Raises:
        CheckpointError: for a file that is missing.
    """
    _expect_file(path)
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: for a file that is missing, truncated or of another kind.
    """
    from safetensors.torch import load_file

    with _refused_if_damaged(path):
        return load_file(str(path))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What the header of a safetensors file says besides its tensors.

    Raises:
        CheckpointError: for a file that is missing, truncated or of another kind.
    """
    from safetensors import safe_open

    with _refused_if_damaged(path), safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _refused_if_damaged(path: str | os.PathLike[str]) -> Iterator[None]:
    _expect_file(path)
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({reason}); is it whole and of the right kind?"
        ) from None


def _expect_file(path: str | os.PathLike[str]) -> None:
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; expected a checkpoint (.pth, .pth.tar or .safetensors)")
