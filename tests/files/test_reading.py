"""Reading other people's files: what is taken, and what is refused in one line."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from foldconv import CheckpointError
from foldconv.files.reading import is_safetensors, read_checkpoint, read_metadata, read_safely, read_safetensors

READERS = [is_safetensors, read_checkpoint, read_metadata, read_safely, read_safetensors]


@pytest.fixture
def weights(tmp_path):
    save_file({"weight": torch.arange(3.0)}, tmp_path / "net.pth", {"from": "here"})  # the name proves nothing
    return tmp_path / "net.pth"


def test_safetensors_are_known_by_content(weights, tmp_path):
    assert is_safetensors(weights)
    assert read_metadata(weights) == {"from": "here"}
    for read in (read_safetensors, read_safely, read_checkpoint):
        assert read(weights)["weight"].tolist() == [0, 1, 2]
    torch.save({"weight": torch.ones(1)}, tmp_path / "net.bin")
    assert not is_safetensors(tmp_path / "net.bin")
    assert read_checkpoint(tmp_path / "net.bin")["weight"].tolist() == [1]


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", None])
def test_wrappers_and_prefixes_are_understood(wrapper, tmp_path):
    tensors = {"module.a": torch.ones(1), "module.b": torch.zeros(1), "epoch": 3}
    torch.save({wrapper: tensors, "epoch": 4} if wrapper else tensors, tmp_path / "net.pth")
    assert sorted(read_checkpoint(tmp_path / "net.pth")) == ["a", "b"]


def test_a_prefix_of_some_names_stays(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.zeros(1)}, tmp_path / "net.pth")
    assert sorted(read_checkpoint(tmp_path / "net.pth")) == ["b", "module.a"]


@pytest.mark.parametrize("read", READERS)
def test_a_missing_file(read, tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth: no such file; expected a checkpoint \(\.pth, "):
        read(tmp_path / "none.pth")


@pytest.mark.parametrize("read", [read_safetensors, read_metadata, read_safely, read_checkpoint])
def test_truncated_safetensors(read, weights):
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"net\.pth: not a readable safetensors file \(.*\); is it whole"):
        read(weights)


class Evil:
    def __reduce__(self):
        return print, ("code of the file's ran",)


@pytest.mark.parametrize("read", [read_safely, read_checkpoint])
def test_code_is_refused_and_does_not_run(read, tmp_path, capsys):
    for save in (lambda path: torch.save({"a": Evil()}, path), lambda path: path.write_bytes(pickle.dumps(Evil(), 2))):
        save(tmp_path / "evil.pth")
        with pytest.raises(CheckpointError, match=r"evil\.pth: refused, since reading it would run code"):
            read(tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(1)], {}, torch.ones(1)])
def test_no_tensors_by_name(content, tmp_path):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=f"expected a dictionary of tensors, found {type(content).__name__}"):
        read_checkpoint(tmp_path / "net.pth")
