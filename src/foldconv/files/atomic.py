"""Writing files so that a full disk, a crash or Ctrl-C never costs the previous version."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._arguments import expect_path
from ..errors import shown

_TEMPORARY = re.compile(r"\.tmp-(?P<place>[0-9a-f]{8})-(?P<process>[0-9]{1,10})-[0-9a-f]{8}(?:\.[^/]*)?")
_LONG_AGO = 7 * 24 * 3600
_looked_through: set[Path] = set()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, what was written there becomes `path`.

    The temporary name keeps the suffix, since writers choose the format by it. Whatever ends the block early
    (an error, a full disk, Ctrl-C) leaves the previous file as it was and removes the temporary one; what a killed
    process left in the folder, the next one removes.

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
    expect_path(path)
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "cannot write a file here: no file has such a name", shown(str(path)))
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "cannot write a file here: not a regular file", str(path))
    if target.exists() and not overwrite:
        raise FileExistsError(errno.EEXIST, "file exists, not overwritten; choose another name", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to write into", str(target.parent))
    _remove_abandoned(target.parent)
    temporary = target.parent / f".tmp-{_place()}-{os.getpid()}-{secrets.token_hex(4)}{target.suffix}"
    try:
        with _true_cause(target):
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
    finally:
        temporary.unlink(missing_ok=True)


def expect_free(path: str | os.PathLike[str], *beside: str | os.PathLike[str]) -> None:
    """Refuse names that are taken, before the work whose result is to get them.

    Raises:
        FileExistsError: something is at `path`, or where a file beside it belongs.
    """
    said = "exists, not overwritten; choose another name"
    for place, why in ((path, said), *((each, f"belongs to {Path(path).name} and {said}") for each in beside)):
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, why, str(place))


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder; when the block ends well, what was written into it moves to where `path` lies, `path` last.

    For formats of several files, or of a folder: each is written under the name that it is to have.

    Args:
        path: the file, or the folder, that the block writes; others beside it may have other names.
        overwrite: whether what is there may be replaced.

    Raises:
        FileExistsError: something of that name exists and ``overwrite=False``.
        IsADirectoryError: a folder lies where a file belongs.
        FileNotFoundError: the folder does not exist, or the block wrote nothing of that name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_folder(Path(folder, "net.xml")) as temporary:
    ...         for name in ("net.xml", "net.bin"):
    ...             _ = (temporary / name).write_text("whole")
    ...     sorted(os.listdir(folder))
    ['net.bin', 'net.xml']
    """
    target = Path(os.path.abspath(path))
    if not overwrite:
        expect_free(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to write into", str(target.parent))
    _remove_abandoned(target.parent)
    temporary = target.parent / f".tmp-{_place()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with _true_cause(target):
            temporary.mkdir()
            yield temporary
            written = sorted(temporary.iterdir(), key=lambda each: each.name == target.name)
            if not written or written[-1].name != target.name:
                raise FileNotFoundError(errno.ENOENT, "nothing was written", str(path))
            for each, place in [(each, target.with_name(each.name)) for each in written]:
                if place.is_dir() and each.is_file() and overwrite:
                    said = "is a folder, which no file replaces; choose another name"
                    raise IsADirectoryError(errno.EISDIR, said, str(place))
                if os.path.lexists(place) and not overwrite:
                    said = "belongs to what is written and exists; choose another name"
                    raise FileExistsError(errno.EEXIST, said, str(place))
            for inner in temporary.rglob("*"):
                sync_folder(inner)  # a file as well: the name must not reach the disk before the bytes do
            for each in written:
                _put(each, target.with_name(each.name), overwrite)
            sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _true_cause(target: Path) -> Iterator[None]:
    """A full disk is called one, whoever met it, and Ctrl-C stays Ctrl-C.

    torch.save, interrupted within, still closes its file, fails at that and raises the failure instead.
    """
    before = sys.exc_info()[1]  # of a caller that is mending something else
    try:
        yield
    except Exception as error:
        behind: BaseException | None = error
        while behind is not None and behind is not before:
            if isinstance(behind, KeyboardInterrupt):
                raise behind from None
            behind = behind.__context__
        if _is_disk_full(error):
            full = "No space left on device: the disk is full; free some space and repeat"
            raise OSError(errno.ENOSPC, full, str(target)) from error
        raise


def _put(written: Path, place: Path, overwrite: bool) -> None:
    """Move a file or a folder to its place."""
    if not overwrite:
        if written.is_file():
            _move_without_replacing(written, place)
            written.unlink(missing_ok=True)
            return
        try:
            os.rename(written, place)  # never replaces a file, or a folder that holds something
        except OSError:
            if not os.path.lexists(place):
                raise
            raise FileExistsError(errno.EEXIST, "appeared meanwhile, not overwritten", str(place)) from None
        return
    if place.is_dir() and not place.is_symlink():  # which no rename replaces: out of the way, and removed at the end
        os.replace(place, written.with_name(f"replaced-{place.name}"))
    os.replace(written, place)


def write_json(path: str | os.PathLike[str], values: Any, *, overwrite: bool = True, indent: int = 2) -> None:
    """Write plain values as a file of JSON, whole or not at all; see `atomic_path`."""
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of processes that ended without doing so; once per process and folder.

    A process of another machine cannot be asked whether it lives, so its files go when they are a week old.
    """
    if folder in _looked_through:
        return
    _looked_through.add(folder)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _TEMPORARY.fullmatch(entry.name)
            if found and not entry.is_symlink():
                here = found["place"] == _place() and os.name == "posix"
                if not _lives(int(found["process"])) if here else time.time() - entry.stat().st_mtime > _LONG_AGO:
                    if entry.is_dir():
                        shutil.rmtree(entry.path, ignore_errors=True)
                        continue
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)


@functools.cache
def _place() -> str:
    """Eight digits for where a process number means something: this machine since it was started, this container."""
    parts = [platform.node()]
    for file in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(file) if file.endswith("pid") else Path(file).read_text())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's; or no number of a process
        return True
    return True


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
