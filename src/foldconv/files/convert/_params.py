"""MXNet's ``.params`` files, read and written without MXNet, which needs an environment of its own.

Little-endian: ``uint64 0x112``, ``uint64 0``, a list of arrays, a list of names; a list starts with its length as
``uint64``. A name is its length as ``uint64`` and its bytes. An array is

    uint32 magic    0xF993FAC9 (or ..CA, where a shape may be empty)
    int32  storage  0: dense
    int32  dimensions, int64 each
    int32  device, int32 its number
    int32  type, an index into `DTYPES`
    the values in C order

Source: apache/mxnet 1.9, src/ndarray/ndarray.cc (NDArray::Save) and include/mxnet/tuple.h.
"""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np

from ...errors import CheckpointError, shown
from ..atomic import atomic_path

_LIST, _V2, _V3 = 0x112, 0xF993FAC9, 0xF993FACA
DTYPES = ("float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool")


def read_params(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a ``.params`` file by name, in its order.

    Raises:
        CheckpointError: for a file that is missing, truncated, of another kind, without names, or holds sparse arrays.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_params(f"{folder}/a.params", {"0.weight": np.ones((2, 3), "float32")})
        ...     read_params(f"{folder}/a.params")["0.weight"].shape
        (2, 3)
    """
    with open(path, "rb") as file:
        content = file.read()
    reader = _Reader(content, path)
    if reader.one("Q") != _LIST:
        raise CheckpointError(f"{path}: not an MXNet .params file (its first number is another); is it of that kind?")
    reader.one("Q")
    arrays = [reader.array() for _ in range(reader.length())]
    names = [reader.bytes(reader.length()).decode("utf-8", "replace") for _ in range(reader.length())]
    if len(names) != len(arrays) or reader.position != len(content):
        raise CheckpointError(
            f"{path}: {len(arrays)} arrays, {len(names)} names and {len(content) - reader.position} bytes more; "
            "expected a name for each array; was it saved with names, and is it whole?"
        )
    return dict(zip(names, arrays))


def write_params(path: str | os.PathLike[str], arrays: dict[str, np.ndarray]) -> None:
    """Write arrays by name so that ``mx.nd.load`` and Gluon's ``load_parameters`` read them; never over a file.

    Raises:
        CheckpointError: for a dtype that MXNet does not have.
        FileExistsError: when the file exists.
    """
    empty = any(array.ndim == 0 for array in arrays.values())
    with atomic_path(path, overwrite=False) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<QQQ", _LIST, 0, len(arrays)))
        for name, array in arrays.items():
            if array.dtype.name not in DTYPES:
                raise CheckpointError(f"{name}: MXNet has no {array.dtype.name}; expected one of {', '.join(DTYPES)}")
            file.write(struct.pack(f"<Iii{array.ndim}q", _V3 if empty else _V2, 0, array.ndim, *array.shape))
            file.write(struct.pack("<iii", 1, 0, DTYPES.index(array.dtype.name)))
            file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
        file.write(struct.pack("<Q", len(arrays)))
        for name in arrays:
            file.write(struct.pack("<Q", len(name.encode())) + name.encode())


class _Reader:
    def __init__(self, content: bytes, path: Any):
        self.content, self.path, self.position = content, path, 0

    def bytes(self, count: int) -> bytes:
        piece = self.content[self.position : self.position + count]
        if len(piece) < count:
            raise CheckpointError(
                f"{self.path}: ends at byte {len(self.content)}, where {self.position + count} were announced; "
                "is it a whole MXNet .params file?"
            )
        self.position += count
        return piece

    def one(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def length(self) -> int:
        """Of a list or a name; bounded, so that a damaged one cannot ask for all memory."""
        return min(self.one("Q"), len(self.content))

    def array(self) -> np.ndarray:
        magic, storage = self.one("I"), None
        if magic in (_V2, _V3):
            storage = self.one("i")
        if storage != 0:
            what = "sparse" if storage else f"of an older format ({magic:#x})"
            raise CheckpointError(f"{self.path}: an array is {what}; save it again with MXNet 1.5 or later, dense")
        dimensions = self.one("i")
        shape = struct.unpack(f"<{max(dimensions, 0)}q", self.bytes(8 * max(dimensions, 0)))
        if dimensions < 0 or (dimensions == 0 and magic == _V2) or any(size < 0 for size in shape):
            raise CheckpointError(f"{self.path}: an array has no values yet; initialize the network before saving it")
        self.bytes(8)
        kind = self.one("i")
        if not 0 <= kind < len(DTYPES):
            raise CheckpointError(f"{self.path}: an array has the unknown type {kind}; expected one of {len(DTYPES)}")
        dtype = np.dtype(DTYPES[kind])
        if max(shape, default=0) > len(self.content):  # of no values, beside a dimension of 0
            raise CheckpointError(f"{self.path}: an array has the shape {shown(shape)}; is the file whole?")
        count = 1
        for size in shape:
            count *= size
        return np.frombuffer(self.bytes(count * dtype.itemsize), dtype.newbyteorder("<")).astype(dtype).reshape(shape)
