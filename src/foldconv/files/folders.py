"""Checkpoints in several files, read without running code.

torch's distributed checkpoints (DCP: FSDP2, Lightning's sharded strategies, accelerate) are a pickle ``.metadata`` and
files of pieces, each piece what `torch.save` writes. torch itself unpickles the first with no restriction; here its
classes are records that do nothing (`_Record`), and any other name is refused. Hugging Face's are a list
``*.index.json`` and whole files beside it. DeepSpeed's are a folder for each step, named in a file ``latest``.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, shown
from ._pickles import check_pickle, would_run
from .reading import is_folder, read_pickled, read_safely, size_of
from .trainers import AVERAGE

_METADATA = ".metadata"
_WHOLE = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
_LISTS = tuple(f"{name}.index.json" for name in _WHOLE)
_CONVERT = "run the zero_to_fp32.py that DeepSpeed has put beside it, and name what that writes"
_CUSTOM = re.compile(r"custom_checkpoint_\d+\.pkl")
"""What accelerate keeps of objects of the user's, such as averages."""
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    **dict.fromkeys(("pathlib", "pathlib._local"), ("Path", "PosixPath", "WindowsPath")),
}


def read_content(path: str | os.PathLike[str]) -> Any:
    """What a checkpoint of one or several files holds, by `read_safely`.

    Raises:
        CheckpointError: for a folder of none of these kinds, or damaged, missing or hostile files.
    """
    if is_folder(path):
        return _read_folder(Path(path))
    return _with_tensors(read_safely(path), path)


def _read_folder(path: Path) -> Any:
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected a list of a checkpoint's files")
        return _read_listed(path)
    if (path / _METADATA).is_file():
        return _read_distributed(path)
    for name, listed in zip(_WHOLE, _LISTS, strict=True):  # in transformers' order
        if (path / name).is_file():
            return _with_others(path / name)
        if (path / listed).is_file():
            return _read_listed(path / listed)
    if (path / "latest").is_file():
        step = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()
        return _read_deepspeed(_beside(path, step, path / "latest"))
    if any(path.glob("mp_rank_*_model_states.pt")):
        return _read_deepspeed(path)
    inside = sorted(each.name for each in path.iterdir())
    listed = ", ".join(map(shown, inside[:5])) + ", ..." * (len(inside) > 5)
    raise CheckpointError(
        f"{path}: expected a checkpoint or a run folder, received a folder without last.ckpt, {_METADATA}, {_WHOLE[0]} "
        f"or {_LISTS[0]}; it holds {listed or 'nothing'}; name a file"
    )


def _with_others(path: Path) -> Any:
    """A whole file; by their names, what lies beside it and may be what is meant: other networks, averages."""
    numbered = re.compile(rf"{re.escape(path.stem)}_\d+{re.escape(path.suffix)}")
    others = [
        each
        for each in sorted(path.parent.iterdir())
        if numbered.fullmatch(each.name)
        or _CUSTOM.fullmatch(each.name)
        or (each.suffix in (".safetensors", ".bin", ".pt", ".pth") and AVERAGE.search(each.stem))
    ]
    if not others:
        return read_safely(path)
    found = {path.name: read_safely(path)}
    for each in others:
        try:
            found[each.name] = read_safely(each)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; to take {path.name}, which lies beside it: {path}") from None
    return found


def _beside(folder: Path, name: Any, named_by: Path) -> Path:
    """A file that another one names, which may lie nowhere else."""
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or set(name) & set("/\\:\0")
        or (folder / name).is_symlink()
    ):
        raise CheckpointError(f"{named_by}: names {shown(name)}; expected a file beside it")
    if not (folder / name).exists():
        raise CheckpointError(f"{named_by}: names {shown(name)}, which is not there; is the folder whole?")
    return folder / name


def _read_listed(index: Path) -> dict[str, Any]:
    """Files that hold a network's tensors together, as Hugging Face's ``weight_map`` says."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): file for tensor, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index}: expected a list of tensors with their files (weight_map)") from None
    tensors: dict[str, Any] = {}
    for file in sorted(set(map(str, names.values()))):
        content = read_safely(_beside(index.parent, file, index))
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{index.parent / file}: expected tensors by name, received {type(content).__name__}")
        for name, value in content.items():
            if names.get(name) != file:
                raise CheckpointError(f"{index.parent / file}: holds {shown(name)}, which {index.name} does not say")
            tensors[name] = value
    if missing := names.keys() - tensors.keys():
        raise CheckpointError(f"{index}: names {shown(min(missing))}, which is in none of its files")
    return tensors


def _read_deepspeed(folder: Path) -> Any:
    files = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if len(files) != 1:
        raise CheckpointError(f"{folder}: holds {len(files)} files mp_rank_*_model_states.pt, expected 1; {_CONVERT}")
    return _with_tensors(read_safely(files[0]), files[0])


def _with_tensors(content: Any, path: Any) -> Any:
    """What was read, unless DeepSpeed has left empty tensors in it."""
    module = content.get("module") if isinstance(content, dict) else None
    tensors = [each for each in module.values() if isinstance(each, Tensor)] if isinstance(module, Mapping) else []
    if tensors and not any(each.numel() for each in tensors if each.dim()):
        raise CheckpointError(f"{path}: its tensors are in other files (ZeRO 3); {_CONVERT}")
    return content


class _Record:
    """Stands for any class in the metadata: its state as it was stored."""

    def __init__(self, *args: Any):
        self.state: Any = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        state = getattr(self, "state", None)
        return state.get(name) if isinstance(state, dict) else None


class _Reader(pickle.Unpickler):
    """Makes records, and nothing else."""

    def __init__(self, file: io.BytesIO, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return type(name, (_Record,), {})
        if (module, name) == ("torch", "Size"):
            return _size
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        raise CheckpointError(would_run(f"{module}.{name}", self._path))


def _size(values: Any = ()) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _read_distributed(folder: Path) -> dict[str, Any]:
    """The tensors of a distributed checkpoint, whole, in the dictionaries that they were saved in."""
    path = folder / _METADATA
    raw = path.read_bytes()
    check_pickle(io.BytesIO(raw), path, count=1)
    try:
        return _assembled(_Reader(io.BytesIO(raw), path).load(), folder)
    except CheckpointError:
        raise
    except Exception as error:  # a pickle of other things
        reason = shown(str(error) or type(error).__name__)[1:-1]
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason}); is it whole?") from None


def _assembled(metadata: Any, folder: Path) -> dict[str, Any]:
    described, stored, planned = (
        metadata.get(name) for name in ("state_dict_metadata", "storage_data", "planner_data")
    )
    pieces: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    for index, info in stored.items():
        pieces.setdefault(index.get("fqn"), []).append((index.get("offset"), info))
    kinds = {
        name: (_size(each.get("size")), _dtype(each))
        for name, each in described.items()
        if each.get("size") is not None
    }
    total, room = sum(math.prod(size) * dtype.itemsize for size, dtype in kinds.values()), size_of(folder)
    if total > 2 * room + (1 << 26) or any(min(size, default=1) < 0 for size, _ in kinds.values()):
        raise CheckpointError(f"{folder}: its tensors have {total:,} bytes, its files {room:,}; is it whole?")
    content: dict[str, Any] = {}
    for name, (size, dtype) in kinds.items():
        way = [str(part) for part in (planned or {}).get(name, (name,))]
        if way[0].startswith("optim"):
            continue
        inner: Any = content
        for part in way[:-1]:
            inner = inner.setdefault(part, {})
        if way[-1] in inner:
            raise CheckpointError(f"{folder}: holds {shown(name)} twice")
        inner[way[-1]] = _whole(name, size, dtype, pieces.get(name, []), folder)
    return content


def _dtype(described: Any) -> torch.dtype:
    dtype = getattr(torch, described.get("properties").state[0])
    if not isinstance(dtype, torch.dtype):
        raise TypeError("properties without a dtype")
    return dtype


def _whole(name: str, size: tuple[int, ...], dtype: torch.dtype, pieces: list[Any], folder: Path) -> Tensor:
    """A tensor from its pieces, which have to cover it."""
    tensor, seen = torch.empty(size, dtype=dtype), torch.zeros(size, dtype=torch.bool)
    for offset, info in pieces:
        piece = _piece(info, folder, name)
        places = tuple(slice(start, start + length) for start, length in zip(offset or (), piece.shape, strict=False))
        fits = len(places) == len(size) == piece.dim() and piece.dtype == dtype
        if not fits or any(place.stop > length for place, length in zip(places, size, strict=True)):
            raise CheckpointError(f"{folder}: {shown(name)}: a piece of it does not fit; is the folder whole?")
        tensor[places], seen[places] = piece, True
    if not seen.all():
        raise CheckpointError(f"{folder}: {shown(name)}: pieces of it are missing; is the folder whole?")
    return tensor


def _piece(info: Any, folder: Path, name: str) -> Tensor:
    file, offset, length = (info.get(key) for key in ("relative_path", "offset", "length"))
    if info.get("transform_descriptors"):
        raise CheckpointError(f"{folder}: {shown(name)}: its pieces are compressed; save without extensions")
    path = _beside(folder, file, folder / _METADATA)
    if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
        raise CheckpointError(f"{folder / _METADATA}: {shown(name)}: expected places in {shown(file)}")
    with open(path, "rb") as opened:
        opened.seek(min(offset, path.stat().st_size))
        data = opened.read(min(length, path.stat().st_size))
    where = f"{path}: {shown(name)}"
    if len(data) != length:
        raise CheckpointError(f"{where}: expected {length:,} bytes, found {len(data):,}; is the file whole?")
    if data[8:9] == b"{":
        from safetensors.torch import load

        try:
            content: Any = load(data)
        except Exception as error:
            raise CheckpointError(f"{where}: not readable ({shown(str(error))[1:-1]})") from None
        content = next(iter(content.values())) if len(content) == 1 else content
    else:
        content = read_pickled(io.BytesIO(data), where)
    if type(content) is not Tensor:
        raise CheckpointError(f"{where}: expected a tensor, received {type(content).__name__}")
    return content
