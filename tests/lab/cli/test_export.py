import json

import pytest
import torch

import foldconv
from foldconv.lab.cli import main


def test_export_of_a_file_of_weights(tmp_path, capsys):
    network = foldconv.zoo.create("digits_resnet", width=4)
    weights, out = tmp_path / "w.pth", tmp_path / "net.pt2"
    torch.save(network.state_dict(), weights)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("abcdefghij"))
    named = ["--architecture", "digits_resnet", "--architecture-args", "width=4"]
    arguments = ["export", str(weights), str(out), *named, "--labels", str(labels)]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["path"] == str(out)
    assert result["error"] < 1e-5
    assert json.loads((tmp_path / "net.json").read_text())["labels"] == list("abcdefghij")
    # Editors on Windows begin a file with a mark, which is no part of the first name.
    labels.write_text("\n".join("abcdefghij"), encoding="utf-8-sig")
    assert main([*arguments, "--force", "--no-check"]) == 0
    assert json.loads((tmp_path / "net.json").read_text())["labels"] == list("abcdefghij")
    # What is there stays; --force replaces it, and --no-check says that nobody looked.
    assert main(arguments) == 1
    assert "is not overwritten; choose another name, or give --force" in capsys.readouterr().err
    assert main([*arguments, "--force", "--no-check"]) == 0
    assert "not checked: check=False" in capsys.readouterr().out
    labels.write_bytes("é\n".encode("latin-1"))
    assert main([*arguments, "--force"]) == 1
    assert "labels.txt: expected text in UTF-8, received the byte 0xe9 at 0; save it as" in capsys.readouterr().err


def test_export_refuses_before_it_reads(tmp_path, capsys):
    assert main(["export", "nothing.ckpt", str(tmp_path / "net.onx")]) == 1
    assert "no format has the suffix '.onx'; expected one of: .onnx (ONNX)" in capsys.readouterr().err
    assert main(["export", "--help"]) == 0
    assert ".tflite" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--fixed-batch=0", "--fixed-batch=x"])
def test_export_of_no_batch(option, tmp_path, capsys):
    assert main(["export", "nothing.ckpt", str(tmp_path / "net.pt2"), option]) == 2
    assert "--fixed-batch" in capsys.readouterr().err
