"""Zip archives (.pth, .ckpt, .npz) tested before anything in them is believed; needs no framework.

Every record of an archive has a checksum (CRC-32). Neither `torch.load` nor a reader that stops early compares it, so a
bit that flipped on a disk becomes a wrong weight.
"""

from __future__ import annotations

import io
import os
import zipfile

from ..errors import CheckpointError

_FIRST = b"PK\x03\x04"
_PIECE = 1 << 20
_MANY, _RATIO = 1 << 30, 100
"""An archive may unpack to that many bytes, or that many times its own: a data set's arrays do, a bomb does not."""

_IS_FOLDER = 0x10
"""MS-DOS' attribute, in a part of the archive that has no checksum."""


def is_archive(path: str | os.PathLike[str] | io.BytesIO) -> bool:
    """Is this a zip archive? By its first bytes, as torch decides it.

    Raises:
        OSError: the file cannot be opened.
    """
    if isinstance(path, io.BytesIO):
        return path.getvalue()[:4] == _FIRST
    with open(path, "rb") as file:
        return file.read(4) == _FIRST


def check_archive(
    path: str | os.PathLike[str] | io.BytesIO, *, compressed: bool = False, called: object = None
) -> None:
    """Read an archive once and compare the checksum of each record; about a second per two gigabytes.

    An archive that was written without checksums (``torch.serialization.set_crc32_options(False)``) has nothing to
    compare, and passes.

    Args:
        path: the file, or its bytes in memory.
        called: what messages call it; its path by default.
        compressed: whether records may be compressed. `torch.save` compresses none.

    Raises:
        CheckpointError: a record is damaged, missing, there twice, compressed, or unpacks to far more than the file.
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with zipfile.ZipFile(f"{folder}/net.pth", "w") as archive:
        ...         archive.writestr("data/0", b"weights")
        ...     check_archive(f"{folder}/net.pth")
        ...     file = Path(folder, "net.pth")
        ...     _ = file.write_bytes(file.read_bytes().replace(b"weights", b"weighty"))
        ...     try:
        ...         check_archive(f"{folder}/net.pth")
        ...     except CheckpointError as error:
        ...         print(str(error).removeprefix(folder))
        /net.pth: damaged: the checksum of its record data/0 is wrong; take another copy of the file
    """
    record, called = "", path if called is None else called
    size = path.getbuffer().nbytes if isinstance(path, io.BytesIO) else os.path.getsize(path)
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            _check_sizes(records, size, compressed, called)
            if all(info.CRC == 0 for info in records):
                return
            for info in records:
                record = info.filename
                with archive.open(info) as file:
                    while file.read(_PIECE):
                        pass
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and zlib raise a dozen classes for what is damaged
        if isinstance(error, zipfile.BadZipFile) and "CRC" in str(error):
            reason = f"the checksum of its record {record[:80]} is wrong"
        else:
            reason = f"not a whole zip archive ({str(error)[:160] or type(error).__name__})"
        raise CheckpointError(f"{called}: damaged: {reason}; take another copy of the file") from None


def count_records(path: str | os.PathLike[str]) -> int:
    """How many records an archive lists, from its directory alone; 0 for what is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return len(archive.infolist())
    except Exception:  # `check_archive` says what is wrong
        return 0


def _check_sizes(records: list[zipfile.ZipInfo], size: int, compressed: bool, path: object) -> None:
    names: set[str] = set()
    for info in records:
        name = info.filename[:80]
        if info.filename in names:
            raise CheckpointError(f"{path}: damaged: holds the record {name} twice; take another copy of the file")
        names.add(info.filename)
        if info.external_attr & _IS_FOLDER and not info.is_dir():  # torch would read nothing there, and say nothing
            raise CheckpointError(
                f"{path}: damaged: its record {name} is called a folder; take another copy of the file"
            )
        if not compressed and info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{path}: its record {name} is compressed, as torch.save never does; load it and save it again"
            )
    total = sum(info.file_size for info in records)
    if total > (max(_MANY, _RATIO * size) if compressed else size):
        raise CheckpointError(
            f"{path}: damaged: its {len(records)} records have {total:,} bytes, far more than the file's {size:,}"
        )
