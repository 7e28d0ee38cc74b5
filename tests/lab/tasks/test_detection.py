"""A detector is trained, folded, resumed, and its data are read as COCO's are."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab.data.folders import size_of
from foldconv.lab.tasks.coco import coco_data
from foldconv.lab.tasks.detection import Detection
from foldconv.lab.train import open_network, resume
from foldconv.network.tree import foldable_layers


def test_a_run_ends_in_the_plain_network(detected):
    folder, result = detected
    assert (result.task, result.measure) == ("detection", "map")
    assert 0 <= result.accuracy_folded <= 1
    assert result.accuracy_folded == pytest.approx(result.accuracy_expanded, abs=0.05)
    assert result.max_output_difference < 1e-6
    with open(folder / "metrics.csv") as file:
        assert file.readline().strip() == "epoch,train_loss,test_map,test_map_50,lr"
        assert len(list(csv.reader(file))) == 2
    rich, description = open_network(folder)
    assert description["classes"] == ["background", "person", "car"]
    assert foldable_layers(rich)
    assert not foldable_layers(open_network(folder / "folded.safetensors")[0])
    with Image.open(folder / "predictions.png") as picture:
        assert picture.size[0] > 100


def test_a_fold_finds_the_same_boxes(detected):
    """As its users call it: a list of images of any size, each box to a millionth of a pixel."""
    rich, _ = open_network(detected[0])
    images = [torch.rand(3, 50, 70, dtype=torch.float64), torch.rand(3, 64, 40, dtype=torch.float64)]
    rich = rich.double().eval()
    folded = foldconv.fold(rich)
    report = foldconv.verify(rich, folded, (images,))
    assert report.layers
    assert report.max_error < 1e-6
    with torch.no_grad():
        found = folded(images)
    assert [each["boxes"].shape[1] for each in found] == [4, 4]
    assert all(len(each["boxes"]) for each in found)


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(detected, tmp_path, silent, monkeypatch):
    folder, result = detected
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / "previous.ckpt").replace(cut / "last.ckpt")
    monkeypatch.setattr("foldconv.lab.train.experiment._finish", lambda *_: result)
    resume(cut, silent)
    ours, theirs = (torch.load(run / "last.ckpt", weights_only=True)["state_dict"] for run in (folder, cut))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_network_that_is_right_has_a_map_of_one(coco):
    pytest.importorskip("faster_coco_eval")
    data = coco_data(str(coco), flip=False, skip=False)
    images, targets = data.test.collate([data.test[index] for index in range(2)])
    right = [{**target, "scores": torch.ones(len(target["boxes"]))} for target in targets]
    assert Detection().score(lambda _: right, [(images, targets)], data)["map"] == pytest.approx(1)
    moved = [{**each, "boxes": each["boxes"] + 40} for each in right]
    assert Detection().score(lambda _: moved, [(images, targets)], data)["map"] < 0.1


def test_boxes_follow_their_images(coco):
    """Cars are blue and persons red, mirrored or not; a crowd is kept for evaluation alone."""
    data = coco_data(str(coco), flip=True, skip=False)
    for seed in range(4):
        torch.manual_seed(seed)
        image, target = data.train[seed]
        for (x1, y1, x2, y2), label in zip(target["boxes"].int().tolist(), target["labels"].tolist()):
            red, _, blue = image[:, (y1 + y2) // 2, (x1 + x2) // 2].int().tolist()
            assert (red > blue) == (label == 1)


@pytest.fixture
def damaged(coco, tmp_path):
    """A function that changes the annotations of val, and opens the set."""
    shutil.copytree(coco, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_val2017.json"
    original = json.loads(file.read_text())

    def change(edit, skip=False):
        content = json.loads(json.dumps(original))
        edit(content)
        file.write_text(json.dumps(content))
        return coco_data(str(tmp_path / "data"), flip=False, skip=skip)

    return change


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 1: its image 99 is not among the images"),
        (
            lambda c: c["annotations"][0].update(category_id=2),
            "expected a category among 1, 3, received 2",
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, 0, 4]),
            "expected a box with an area, received .1, 2, 0, 4.",
        ),
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), "expected a box .x, y, width, height., received .1, 2."),
        (lambda c: c["annotations"][0].update(bbox=[900, 2, 3, 3]), "lies outside its image of 80×64"),
        (lambda c: c.update(annotations=[]), "expected boxes, found none"),
        (lambda c: c.update(images=[], annotations=[]), "expected images, found none; this split is empty"),
        (lambda c: c["images"][0].update(file_name="no.jpg"), "lists 'no.jpg', which is not in"),
        (lambda c: c["categories"][0].update(name="cat"), "expected the same categories in train and val"),
        (lambda c: c.pop("images"), "as COCO has them: no 'images'"),
    ],
)
def test_what_is_wrong_with_annotations_is_said(damaged, edit, text):
    with pytest.raises(UnsupportedError, match=text):
        damaged(edit)


def test_boxes_are_of_the_image_as_it_is_read(coco, tmp_path):
    """An image that its EXIF orientation turns is read upright; boxes of its pixels would lie elsewhere."""
    folder = tmp_path / "data"
    shutil.copytree(coco, folder)
    path = Path(coco_data(str(folder), flip=False, skip=False).train._images[0][0])
    with Image.open(path) as image:
        exif, (width, height) = image.getexif(), image.size
        exif[274] = 6
        image.load()
        image.save(path, exif=exif)
    assert size_of(path) == (width, height) != (height, width)
    data = coco_data(str(folder), flip=False, skip=False)
    with pytest.raises(UnsupportedError, match=rf"is {height}×{width} upright, .* image of {width}×{height}; store"):
        data.train[0]
    file = folder / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    first = next(each for each in content["images"] if each["file_name"] == path.name)
    first.update(height=width, width=height)
    file.write_text(json.dumps(content))
    assert coco_data(str(folder), flip=False, skip=True).train[0][0].shape[1:] == (width, height)


def test_boxes_without_an_area_can_be_left_out(damaged):
    def edit(content):
        content["annotations"][0]["bbox"] = [1, 2, 0, 4]

    before, after = damaged(lambda _: None), damaged(edit, skip=True)
    assert len(after.test[0][1]["boxes"]) == len(before.test[0][1]["boxes"]) - 1


def test_crowds_are_for_evaluation(damaged):
    data = damaged(lambda content: content["annotations"][0].update(iscrowd=1))
    target = data.test[0][1]
    assert target["iscrowd"].tolist()[0] == 1
    data.test._crowds = False
    assert len(data.test[0][1]["boxes"]) == len(target["boxes"]) - 1


def test_options_are_checked(short):
    for given, text in (
        ({"label_smoothing": 0.1}, "label_smoothing: detection has no such option; expected 0.0, received 0.1"),
        ({"augmentation": "crop"}, "augmentation: expected one of default, none, flip, received 'crop'"),
    ):
        with pytest.raises(UnsupportedError, match=text):
            Detection().check(short(task="detection", **given))
