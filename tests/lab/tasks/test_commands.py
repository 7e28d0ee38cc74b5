"""The commands on a segmentation's and a detection's run: they work, or say in a line why not."""

import json

from foldconv.lab.cli import main


def test_of_a_segmentation(segmented, cityscapes, tmp_path, capsys):
    folder, result = segmented
    assert main(["eval", str(folder / "folded.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["miou"]) == ("segmentation", result.accuracy_folded)
    assert main(["fold", str(folder), str(tmp_path / "deploy.safetensors"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["max_error"] < 1e-4
    assert report["layers"]
    image = next((cityscapes / "leftImg8bit" / "val").rglob("*.png"))
    picture = tmp_path / "seen.png"
    assert main(["predict", str(folder), str(image), "--picture", str(picture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["images"][0]["predictions"]
    assert 0 < sum(each["share"] for each in found) <= 1.0001
    assert picture.stat().st_size > 1000
    assert main(["export", str(folder), str(tmp_path / "seen.pt2")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(folder), "--ranges"]) == 1
    assert "segmentation: only classifiers are" in capsys.readouterr().err


def test_of_a_detection(detected, coco, tmp_path, capsys):
    folder, result = detected
    assert main(["eval", str(folder / "folded.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["map"]) == ("detection", result.accuracy_folded)
    images = sorted((coco / "val2017").glob("*.jpg"))
    picture = tmp_path / "seen.png"
    options = ["--picture", str(picture), "--top", "3", "--json"]
    assert main(["predict", str(folder / "folded.safetensors"), *map(str, images), *options]) == 0
    found = json.loads(capsys.readouterr().out)["images"]
    assert [len(each["predictions"]) for each in found] == [3, 3]
    assert {each["class"] for each in found[0]["predictions"]} <= {"background", "person", "car"}
    assert picture.stat().st_size > 1000
    assert main(["export", str(folder), str(tmp_path / "net.onnx")]) == 1
    error = capsys.readouterr().err
    assert "as many boxes as it finds" in error
    assert error.count("\n") == 1


def test_data_that_are_not_there(capsys, tmp_path):
    assert main(["train", "--task", "detection", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "digits: expected one file annotations/instances_train*.json, as COCO has it, found none" in error
    assert not (tmp_path / "run").exists()
