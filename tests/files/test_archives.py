"""Archives whose checksums are compared: every flipped bit of a value is found, before a tensor exists."""

import random
import warnings
import zipfile

import pytest
import torch

from foldconv import CheckpointError
from foldconv.files import archives
from foldconv.files.archives import check_archive
from foldconv.files.reading import read_safely


@pytest.fixture
def saved(tmp_path):
    content = {"a": torch.arange(500.0), "b": torch.ones(30, dtype=torch.float64)}
    torch.save(content, tmp_path / "net.ckpt")
    return tmp_path / "net.ckpt", content


def test_a_flipped_bit_is_found_wherever_it_matters(saved):
    path, content = saved
    whole, said = path.read_bytes(), []
    chosen = random.Random(0)
    start = whole.find(content["a"].numpy().tobytes())
    places = [start, start + 1999, *(chosen.randrange(len(whole)) for _ in range(150))]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chosen.randrange(8)
        path.write_bytes(flipped)
        try:
            read = read_safely(path)
        except CheckpointError as error:
            said.append(str(error))
        else:  # padding and dates: nothing that anybody reads
            assert all(torch.equal(read[name], tensor) for name, tensor in content.items())
    assert all("\n" not in text and len(text) < 500 for text in said)
    found = sum("the checksum of its record" in text for text in said)
    assert 0 < found < len(said) < len(places)


@pytest.mark.parametrize("length", [5, 700, -1])
def test_a_truncated_archive(saved, length):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"net\.ckpt: damaged: not a whole zip archive .*; take another copy"):
        read_safely(path)


def test_without_checksums_there_is_nothing_to_compare(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "net.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_safely(tmp_path / "net.pth")["a"].tolist() == [1, 1, 1]


def test_records_that_are_compressed_doubled_or_far_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MANY", 1 << 20)
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(1000))
    check_archive(path, compressed=True)
    with pytest.raises(CheckpointError, match=r"its record a is compressed, as torch\.save never does"):
        check_archive(path)
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    with pytest.raises(CheckpointError, match="holds the record a twice"):
        check_archive(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(1_100_000))
    with pytest.raises(CheckpointError, match=r"its 1 records have 1,100,000 bytes, far more than the file's"):
        check_archive(path, compressed=True)


def test_a_record_that_a_flipped_bit_calls_a_folder(saved):
    """Torch would leave its tensor as the memory was; the list of records has no checksum."""
    path, _ = saved
    with zipfile.ZipFile(path) as archive:
        name = next(info.filename for info in archive.infolist() if info.filename.endswith("data/0")).encode()
    content = bytearray(path.read_bytes())
    entry = content.rfind(name) - 46  # the list's, behind the records
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + 38] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: its record .*data/0 is called a folder"):
        check_archive(path)
