"""`inspect --ranges`: of a run folder and a name; as table, JSON and picture."""

import pytest

import foldconv
from foldconv.lab.train import create_data, open_network


def test_a_run_is_looked_at_with_its_training_images(call, call_json, run_folder, tmp_path):
    picture = tmp_path / "ranges.png"
    result = call_json("inspect", run_folder, "--ranges", "--plot", picture, "--images", 1437)
    images = create_data("digits", augmentation="none").train.tensors[0]
    data = create_data("digits", augmentation="none")
    expected = foldconv.range_report(open_network(run_folder)[0], data.transform(images)).to_json()
    assert [layer["name"] for layer in result["layers"]] == [layer["name"] for layer in expected["layers"]]
    for ours, theirs in zip(result["layers"], expected["layers"]):
        assert ours["weights"] == theirs["weights"]
        assert ours["activations"]["high"] == pytest.approx(theirs["activations"]["high"], rel=1e-4, abs=1e-4)
    assert (result["samples"], result["architecture"]) == (1437, "digits_resnet")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, out, err = call("inspect", run_folder / "folded.safetensors", "--ranges", "--images", 3)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split()[:3] == ["layer", "type", "weights"]
    assert "of the folded network, 3 samples" in out


def test_a_name_needs_data(call_json, fails, run_folder, tmp_path):
    name = ["digits_resnet", "--architecture-args", "width=4"]
    assert "name data with --calibration" in fails("inspect", *name, "--ranges")
    assert call_json("inspect", *name, "--ranges", "--calibration", "digits", "--images", 8)["samples"] == 8
    assert "unknown data" in fails("inspect", *name, "--ranges", "--calibration", "digit")
    assert "not allowed with" in fails("inspect", run_folder, "--ranges", "--branches", code=2)
    assert "leave --input-shape out" in fails("inspect", run_folder, "--ranges", "--input-shape", 1, 8, 8, code=2)
    assert "no folder" in fails("inspect", run_folder, "--ranges", "--plot", tmp_path / "no" / "a.png")
