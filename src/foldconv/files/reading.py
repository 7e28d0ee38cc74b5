"""Reading other people's checkpoint files without running their code, and without believing them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import expect_path
from ..errors import CheckpointError, shown
from ._pickles import check_pickle, inert_values
from .archives import check_archive, is_archive

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "network", "module")
"""Where trainers put the weights, best first: where one keeps an average beside them, it validates that."""
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What compiling and wrapping put into names; nobody's own modules are called so."""
_PREFIX = "module."
_AVERAGED = "n_averaged"
_PLENTY = 1 << 26


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without what trainers, compilers and parallel training put around them.

    Weights in an entry ``state_dict``, ``model``, ``net``, ... are found there; of an average of weights and the last
    ones (``state_dict_ema``, ``model_ema``) the average is taken. Prefixes ``module.`` and ``_orig_mod.`` go.

    Raises:
        CheckpointError: for a file that is missing, unreadable, damaged, would run code, holds no tensors, or something
            else where a tensor belongs.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"module._orig_mod.weight": torch.ones(1)}, "epoch": 3}, f"{folder}/net.pth")
        ...     read_checkpoint(f"{folder}/net.pth")
        {'weight': tensor([1.])}
    """
    content = read_safely(path)
    entries = _weights_in(content, path)
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(content).__name__} without any")
    own = {name.rpartition(".")[2] for name in tensors} | {"weight", "bias"}
    for name, value in entries.items():
        if not isinstance(value, Tensor) and ("." in name or name in own) and not name.endswith("_extra_state"):
            raise CheckpointError(f"{path}: {shown(name)}: expected a tensor, received {kind_of(value)}")
    check_plain(tensors, path)
    averaged = tensors.pop(_AVERAGED, None)
    for _ in range(1 if averaged is None else 2):
        if all(name.startswith(_PREFIX) for name in tensors):
            tensors = {name[len(_PREFIX) :]: tensor for name, tensor in tensors.items()}
    return tensors


def _weights_in(content: Any, path: Any) -> dict[str, Any]:
    """The entries of the innermost dictionary that holds weights, by names without what was put inside of these."""
    for _ in range(len(_WRAPPERS)):  # and not for ever: a dictionary may hold itself
        if not isinstance(content, Mapping):
            return {}
        inside = [name for name in _WRAPPERS if isinstance(content.get(name), Mapping)]
        if not inside and not any(isinstance(value, Tensor) for value in content.values()):
            inside = [name for name, value in content.items() if isinstance(value, Mapping) and _has_tensors(value)]
            if len(inside) > 1:
                listed = ", ".join(map(shown, inside[:5]))
                raise CheckpointError(
                    f"{path}: holds {len(inside)} dictionaries of tensors, {listed}; save the one that is meant alone"
                )
        if not inside:
            break
        content = content[inside[0]]
    if not isinstance(content, Mapping):
        return {}
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(name, str):
            short = _INSIDE.sub("", name)
            if short in found:
                raise CheckpointError(f"{path}: holds {shown(name)} with and without '_orig_mod.'; which one is meant?")
            found[short] = value
    return found


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values())


def check_plain(tensors: Mapping[str, Tensor], path: Any) -> None:
    """Refuse tensors that have no plain values of their own in memory, and more values than a file can hold.

    Raises:
        CheckpointError: naming the tensor, what it is, and the remedy.
    """
    sizes: dict[Any, int] = {}
    for name, tensor in tensors.items():
        remedy = other_than_plain(tensor)
        if remedy:
            raise CheckpointError(f"{path}: {shown(name)}: expected plain values, received {kind_of(tensor)}; {remedy}")
        if tensor.numel():
            where = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            sizes[where] = tensor.numel() * tensor.element_size()
    total, room = sum(sizes.values()), os.path.getsize(path)
    if total > max(2 * room, room + _PLENTY):
        raise CheckpointError(f"{path}: its tensors have {total:,} bytes, the file {room:,}; is it a checkpoint?")


def check_floating(tensors: Mapping[str, Tensor], path: Any) -> None:
    """Refuse integer, boolean and complex weights; a norm's count of batches is an integer.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{path}: {shown(name)}: expected floating point values, received {kind}")


def other_than_plain(tensor: Tensor) -> str:
    """What to do about a tensor that is none of plain values; empty for a plain one."""
    if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
        return "save full_tensor() or another plain copy"
    if tensor.is_meta:
        return "it has a shape only; save the network after it was given values"
    if tensor.is_quantized:
        return "save it before it is quantized, or its dequantize()"
    if tensor.layout != torch.strided:
        return "save its to_dense()"
    return ""


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    kind = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
    return f"a {kind} tensor"


def read_safely(path: str | os.PathLike[str]) -> Any:
    """What a checkpoint file holds: tensors and plain values; a file that would run code is refused.

    Of values that are neither (NumPy's, a namespace, a path) an object without content is left.

    Raises:
        CheckpointError: for a file that is missing, damaged (checksums are compared) or holds anything else.
    """
    if is_safetensors(path):
        return read_safetensors(path)
    _check_pickles(path)
    try:
        with inert_values():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise CheckpointError(
                f"{path}: refused, since reading it would run code of {shown(found[1])[1:-1]}; where that is trusted, "
                "load it and save its state_dict() alone"
            ) from None
        if "DTensor" in str(error):
            raise CheckpointError(f"{path}: holds sharded tensors (DTensor); save full_tensor() of each") from None
        # torch surrounds its reason with advice, or goes on with it.
        text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        reason = (text.strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason[:200]}); is it whole?") from None


def _check_pickles(path: str | os.PathLike[str]) -> None:
    """Before torch makes anything of them."""
    if not is_archive(path):
        with open(path, "rb") as file:
            check_pickle(file, path)
        return
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename.endswith(("/data.pkl", "/constants.pkl")):
                del info.CRC  # compared already, or never written
                check_pickle(io.BytesIO(archive.read(info)), path, count=1)


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
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({reason}); is it whole and of the right kind?"
        ) from None


def _expect_file(path: str | os.PathLike[str]) -> None:
    expect_path(path)
    if "\0" in str(path) or not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; expected a checkpoint (.pth, .pth.tar or .safetensors)")
