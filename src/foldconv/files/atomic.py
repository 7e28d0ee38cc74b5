"""Writing files so that a full disk, a crash or Ctrl-C never costs the previous version."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, what was written there becomes `path`.

    The temporary name keeps the suffix, since writers choose the format by it. Whatever ends the block early
    (an error, a full disk, Ctrl-C) leaves the previous file as it was and removes the temporary one.

    Args:
        path: the file to write; a symbolic link is followed.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError: the file exists and ``overwrite=False``; checked before and, without a race, after writing.
        FileNotFoundError: the folder does not exist, or the block wrote nothing.
        OSError: the path is a folder or a device, or the disk is full.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     target = Path(folder, "notes.txt")
    ...     with atomic_path(target) as temporary:
    ...         _ = temporary.write_text("whole")
    ...     target.read_text(), os.listdir(folder)
    ('whole', ['notes.txt'])
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "cannot write a file here: not a regular file", str(path))
    if target.exists() and not overwrite:
        raise FileExistsError(errno.EEXIST, "file exists, not overwritten; choose another name", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to write into", str(target.parent))
    temporary = target.parent / f".tmp-{secrets.token_hex(6)}{target.suffix}"
    try:
        mode = _mode_for(target, temporary)
        yield temporary
        os.chmod(temporary, mode)  # some writers (safetensors) make files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the bytes do
        if overwrite:
            os.replace(temporary, target)
        else:
            _move_without_replacing(temporary, target)
        sync_folder(target.parent)
    except Exception as error:
        if _is_disk_full(error):
            full = "No space left on device: the disk is full; free some space and repeat"
            raise OSError(errno.ENOSPC, full, str(target)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], values: Any, *, overwrite: bool = True, indent: int = 2) -> None:
    """Write plain values as a file of JSON, whole or not at all; see `atomic_path`."""
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether that is behind an error in writing: torch and safetensors raise ones of their own."""
    full = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
    while error is not None:
        if getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full):
            return True
        error = error.__cause__ or error.__context__
    return False


def _mode_for(target: Path, temporary: Path) -> int:
    """The permissions of the file there is, or those a new one gets, which only creating one can tell."""
    if not target.exists():
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        temporary.unlink()  # a block that writes nothing must not make an empty file
        return mode
    return stat.S_IMODE(target.stat().st_mode)


def _move_without_replacing(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)  # unlike a rename, a link never replaces: no window between check and move
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "file appeared meanwhile, not overwritten", str(target)) from None
    except OSError:  # a file system without hard links: the check at the start has to do
        os.replace(temporary, target)


def sync_folder(folder: Path) -> None:
    """Make the new name durable, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
