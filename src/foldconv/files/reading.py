"""Reading other people's checkpoint files without running their code, and without believing them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import expect_path
from ..errors import CheckpointError, shown
from ._pickles import check_pickle, inert_values, stored_modules, without_modules, would_run
from .archives import check_archive, is_archive

_PLENTY = 1 << 26


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
    total, room = sum(sizes.values()), size_of(path)
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
    return read_pickled(path, path)


def read_pickled(file: Any, path: Any) -> Any:
    """`read_safely` of a file of `torch.save` or a part of one, `file`: its path, or its bytes in memory.

    Raises:
        CheckpointError: as `read_safely`.
    """
    names = _check_pickles(file, path)
    try:
        with inert_values(stored_modules(names)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # said below
            return without_modules(torch.load(file, map_location="cpu", weights_only=True), path)
    except CheckpointError:
        raise
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise CheckpointError(would_run(found[1], path)) from None
        if "DTensor" in str(error):
            raise CheckpointError(f"{path}: holds sharded tensors (DTensor); save full_tensor() of each") from None
        if "Unsupported operand 149" in str(error):  # FRAME, which pickle's protocols have from 4 on
            raise CheckpointError(
                f"{path}: pickled by another protocol than torch.save's own, which is not read without running code; "
                "load it and save it again without pickle_protocol="
            ) from None
        # torch surrounds its reason with advice, or goes on with it.
        text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        reason = (text.strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason[:200]}); is it whole?") from None


def _check_pickles(file: Any, path: Any) -> set[str]:
    """Before torch makes anything of them; what they name."""
    names: set[str] = set()
    if not is_archive(file):
        with contextlib.nullcontext(file) if isinstance(file, io.BytesIO) else open(file, "rb") as opened:
            names = check_pickle(opened, path)
    else:
        _expect_saved(file, path)
        check_archive(file, called=path)
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.filename.endswith("/data.pkl"):
                    del info.CRC  # compared already, or never written
                    names |= check_pickle(io.BytesIO(archive.read(info)), path, count=1)
    if isinstance(file, io.BytesIO):
        file.seek(0)
    return names


def _expect_saved(file: Any, path: Any) -> None:
    """Tell archives of other kinds apart; of damaged ones `check_archive` says more."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises a dozen classes
        return
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path}: a TorchScript program; save its weights alone: torch.save(torch.jit.load('{path}').state_dict(), "
            "'weights.pth')"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(
            f"{path}: a zip archive, but none of torch.save's; it holds {shown(min(names, default=''))}"
        )


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Is this a checkpoint in several files: a folder, or the list of what is in which file?"""
    expect_path(path)
    return "\0" not in str(path) and (Path(path).is_dir() or str(path).endswith(".index.json"))


def size_of(path: Any) -> int:
    """Bytes of a file, or of the files in a folder."""
    if not is_folder(path):
        return os.path.getsize(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


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
