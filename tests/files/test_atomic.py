"""What a reader finds under the name at every moment: the old file or the new one, whole, and no leftovers."""

import contextlib
import errno
import io
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from foldconv.files import atomic as _files
from foldconv.files.atomic import atomic_folder, atomic_path


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    return path


def assert_untouched(target):
    assert target.read_bytes() == b"old"
    assert os.listdir(target.parent) == [target.name]


def test_replaces_only_at_the_end(target):
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
        assert temporary.parent == target.parent  # a rename is atomic only within one file system
        assert temporary.suffix == ".bin"
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("x"), RuntimeError("(os error 5)")])
def test_failure_keeps_the_previous_file(target, failure):
    def write():
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert_untouched(target)


class _Interrupted(io.FileIO):
    times = 0

    def write(self, data):
        self.times += 1
        if self.times == 2:  # the name of the first record is out
            raise KeyboardInterrupt
        return super().write(data)


def test_ctrl_c_within_torch_save_stays_ctrl_c(target):
    """torch closes the archive it could not finish, which fails, and raises that failure."""
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(target) as temporary, _Interrupted(temporary, "w") as file:
            torch.save({"weight": torch.zeros(3)}, file)
    assert_untouched(target)


def test_ctrl_c_before_is_not_the_cause(target):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(ValueError, match="its own"), atomic_path(target):
            raise ValueError("its own") from None
    assert_untouched(target)


def test_disk_full_at_the_very_end(target, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full; free some space and repeat"):
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
    assert_untouched(target)


class Full(io.RawIOBase):
    """A file on a full disk."""

    def writable(self):
        return True

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def write_as_safetensors():
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("write", [lambda: torch.save({"a": torch.zeros(10**5)}, Full()), write_as_safetensors])
def test_a_full_disk_is_called_so(target, write):
    """Whatever the writer makes of it; torch alone tells of an "unexpected pos"."""
    with pytest.raises(OSError, match="the disk is full; free some space and repeat: ") as caught:
        with atomic_path(target):
            write()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert_untouched(target)


def test_synced_before_renamed(target, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(_files.os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(_files.os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
    assert calls[:2] == ["fsync", "replace"]


def test_refuses_to_overwrite(target):
    with pytest.raises(FileExistsError, match=r"not overwritten.*weights\.bin"):
        with atomic_path(target, overwrite=False):
            pytest.fail("the block must not run")
    assert_untouched(target)


def test_refuses_a_file_that_appears_meanwhile(tmp_path):
    target = tmp_path / "weights.bin"

    def write():
        with atomic_path(target, overwrite=False) as temporary:
            temporary.write_bytes(b"new")
            target.write_bytes(b"old")

    with pytest.raises(FileExistsError, match="appeared meanwhile"):
        write()
    assert_untouched(target)


def test_new_file_without_overwrite(tmp_path):
    with atomic_path(tmp_path / "new.txt", overwrite=False) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "new.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["new.txt"]


def test_file_system_without_links(tmp_path, monkeypatch):
    def unsupported(source, target):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(_files.os, "link", unsupported)
    with atomic_path(tmp_path / "new.txt", overwrite=False) as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["new.txt"]


def test_nothing_written_is_an_error(target):
    with pytest.raises(FileNotFoundError):
        with atomic_path(target):
            pass
    assert_untouched(target)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder.*nowhere"):
        with atomic_path(tmp_path / "nowhere" / "file"):
            pytest.fail("the block must not run")


@pytest.mark.parametrize("special", ["/dev/null", "."])
def test_never_replaces_a_device_or_folder(special, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="not a regular file"):
        with atomic_path(special):
            pytest.fail("the block must not run")


def test_follows_a_symbolic_link(target, tmp_path_factory):
    link = tmp_path_factory.mktemp("elsewhere") / "link.bin"
    link.symlink_to(target)
    with atomic_path(link) as temporary:
        temporary.write_bytes(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_permissions_are_an_ordinary_file_s(tmp_path, target):
    """Some writers make private files; a new file gets what the umask says, an old one keeps what it had."""
    target.chmod(0o640)
    for path in (target, tmp_path / "new.bin"):
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"new")
            temporary.chmod(0o600)
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert (tmp_path / "new.bin").stat().st_mode == ordinary.stat().st_mode
    assert target.stat().st_mode & 0o777 == 0o640


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    program = """
import os, sys
from foldconv.files.atomic import atomic_folder, atomic_path

with atomic_path(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    print(temporary, flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        processes = [subprocess.Popen([sys.executable, "-c", program, tmp_path / f"{n}.bin"], **pipes) for n in "ab"]
        killed, living = (stack.enter_context(process) for process in processes)
        left, kept = (process.stdout.readline().strip() for process in (killed, living))
        killed.kill()
        killed.wait()
        assert sorted(os.listdir(tmp_path)) == sorted(map(os.path.basename, (left, kept)))
        elsewhere = [tmp_path / f".tmp-{'0' * 8}-1-{digit * 8}.bin" for digit in "12"]
        others = [tmp_path / name for name in (".tmp-mine", ".tmp-0123456789ab.bin", "a.tmp-00000000-1-00000000")]
        for file in (*elsewhere, *others):
            file.write_bytes(b"")
            os.utime(file, (0, 0))
        os.utime(elsewhere[1])  # of another machine, and recent
        monkeypatch.setattr(_files, "_looked_through", set())
        with atomic_path(tmp_path / "c.bin") as temporary:
            temporary.write_bytes(b"whole")
        expected = {"c.bin", os.path.basename(kept), elsewhere[1].name, *(file.name for file in others)}
        assert set(os.listdir(tmp_path)) == expected
        living.communicate("\n")
    assert (tmp_path / "b.bin").read_bytes() == b"half"


# ---------------------------------------------------------------------- several files, and folders


def write_all(path, text, **options):
    with atomic_folder(path, **options) as temporary:
        for name in (path.name, "beside.bin"):
            (temporary / name).write_text(text)


def test_several_files_appear_together_or_not_at_all(tmp_path):
    path = tmp_path / "net.xml"
    with contextlib.suppress(ZeroDivisionError), atomic_folder(path) as temporary:
        (temporary / "net.xml").write_text("half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    (tmp_path / "beside.bin").write_text("precious")
    with pytest.raises(FileExistsError, match=r"belongs to what is written and exists.*beside\.bin"):
        write_all(path, "new")
    assert os.listdir(tmp_path) == ["beside.bin"]
    assert (tmp_path / "beside.bin").read_text() == "precious"
    write_all(path, "new", overwrite=True)
    assert [(tmp_path / name).read_text() for name in sorted(os.listdir(tmp_path))] == ["new", "new"]
    with pytest.raises(FileExistsError, match="exists, not overwritten"):
        write_all(path, "newer")
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic_folder(tmp_path / "other") as temporary:
        (temporary / "beside.txt").touch()
    assert sorted(os.listdir(tmp_path)) == ["beside.bin", "net.xml"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_replaced_only_when_told(tmp_path, overwrite):
    path = tmp_path / "net.mlpackage"
    with contextlib.nullcontext() if overwrite else pytest.raises(FileExistsError, match="and exists"):
        with atomic_folder(path, overwrite=overwrite) as temporary:
            (temporary / path.name).mkdir()
            (temporary / path.name / "new").touch()
            path.mkdir()  # while we were writing
            (path / "precious").touch()
    assert os.listdir(path) == ["new" if overwrite else "precious"]
    assert os.listdir(tmp_path) == ["net.mlpackage"]


def test_no_file_replaces_a_folder(tmp_path):
    path = tmp_path / "net.xml"
    path.mkdir()
    (path / "precious").touch()
    with pytest.raises(IsADirectoryError, match="is a folder, which no file replaces"):
        write_all(path, "new", overwrite=True)
    assert os.listdir(path) == ["precious"]
    assert os.listdir(tmp_path) == ["net.xml"]
