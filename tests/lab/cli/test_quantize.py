import json

import numpy as np
import pytest
from PIL import Image


def test_quantize_of_a_run(run_folder, tmp_path, call, call_json, fails):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("brevitas")
    out = tmp_path / "net.onnx"
    found = call_json("quantize", run_folder, out, "--images", 32, "--judge", 100, "--keep-float", "head")
    assert found["calibrated"] == 32
    assert found["judged"] == 100
    assert found["float_layers"] == found["kept"] == ["head"]
    assert abs(found["accuracy"] - found["accuracy_before"]) < 0.1
    assert found["error"] < 0.2
    assert "file exists and is not overwritten" in fails("quantize", run_folder, out)
    # A folder of images has no labels: judged by the output.
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.fromarray(np.random.randint(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    code, text, _ = call("quantize", run_folder, out, "--calibration", tmp_path / "images", "--force", "--no-equalize")
    assert code == 0
    assert "calibrated with 3 samples" in text
    assert "accuracy" not in text


def test_quantize_refuses_in_one_line(run_folder, tmp_path, fails, call, monkeypatch):
    assert ".pt2: torch.export is not written in int8" in fails("quantize", run_folder, tmp_path / "net.pt2")
    assert "--auto-keep" in fails("quantize", run_folder, tmp_path / "net.onnx", "--auto-keep", "x", code=2)
    monkeypatch.setattr("foldconv.deploy.formats.Format.expect_int8", lambda self: None)
    (tmp_path / "empty").mkdir()
    asked = ["quantize", run_folder, tmp_path / "net.onnx", "--calibration"]
    assert "empty: expected images in this folder" in fails(*asked, tmp_path / "empty")
    colours = np.zeros((2, 8, 8, 3), np.uint8)
    arrays = {"x_train": colours, "y_train": np.arange(2), "x_test": colours, "y_test": np.arange(2)}
    np.savez(tmp_path / "colours.npz", **arrays)
    expected = "expected images of shape (1, 8, 8), as in training, received (3, 8, 8)"
    assert expected in fails(*asked, tmp_path / "colours.npz")
    code, text, _ = call("quantize", "--help")
    assert code == 0
    assert "ONNX Runtime, QDQ" in text
    assert json.dumps([each.name for each in tmp_path.iterdir() if each.suffix == ".onnx"]) == "[]"
