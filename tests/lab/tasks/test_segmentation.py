"""A segmentation is trained, folded, resumed, and its data are read as Cityscapes' are."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from foldconv.errors import UnsupportedError
from foldconv.lab.tasks.cityscapes import CLASSES, cityscapes_data, crop_options
from foldconv.lab.tasks.segmentation import Segmentation, Segmenter
from foldconv.lab.train import open_network, resume
from foldconv.lab.train.building import build
from foldconv.lab.train.optimizers import configured_groups
from foldconv.network.tree import foldable_layers


def test_a_run_ends_in_the_plain_network(segmented):
    folder, result = segmented
    assert (result.task, result.measure) == ("segmentation", "miou")
    assert 0 < result.accuracy_folded <= 1
    assert result.accuracy_folded == pytest.approx(result.accuracy_expanded, abs=1e-3)
    assert result.max_output_difference < 1e-4
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    assert {"train_loss", "test_miou", "test_accuracy"} < rows[0].keys()
    rich, description = open_network(folder)
    assert description["task"] == "segmentation"
    assert list(description["classes"]) == list(CLASSES)
    assert foldable_layers(rich)
    assert all(name.startswith("backbone.") for name in foldable_layers(rich))
    plain, _ = open_network(folder / "folded.safetensors")
    assert not foldable_layers(plain)
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(rich(images)["out"], plain(images)["out"], rtol=1e-4, atol=1e-4)
    with Image.open(folder / "predictions.png") as picture:
        assert picture.size[0] > 100


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(segmented, tmp_path, silent, monkeypatch):
    folder, result = segmented
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / "previous.ckpt").replace(cut / "last.ckpt")
    monkeypatch.setattr("foldconv.lab.train.experiment._finish", lambda *_: result)
    resume(cut, silent)
    ours, theirs = (torch.load(run / "last.ckpt", weights_only=True)["state_dict"] for run in (folder, cut))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_stem_learns_by_its_own_rate(segmented, short):
    net, _ = open_network(segmented[0])
    groups = configured_groups(net, short(stem_lr_factor=0.1))
    slow = {id(p) for group in groups if group["lr"] < 0.001 for p in group["params"]}
    assert slow == {id(p) for p in net.backbone["0"][0].parameters()}


def test_pixels_without_a_class_teach_nothing(short):
    net = torch.nn.Conv2d(3, 19, 1)
    module = Segmenter(net, short(task="segmentation"))
    masks = torch.full((2, 4, 4), 255)
    assert [float(each.detach()) for each in module(torch.randn(2, 3, 4, 4), masks)] == [0, 0, 0]
    masks[:, 0, 0] = 3
    images = torch.randn(2, 3, 4, 4)
    _, loss, right = module(images, masks)
    logits = net(images)[:, :, 0, 0]
    expected = torch.nn.functional.cross_entropy(logits, masks[:, 0, 0])
    torch.testing.assert_close(loss, expected.detach())
    assert right == (logits.argmax(1) == 3).sum()


def test_miou_is_the_mean_over_classes(cityscapes):
    data = cityscapes_data(str(cityscapes), None, crop_options({}, "none"))
    truth = torch.tensor([[[0, 0, 1, 1], [2, 2, 255, 255]]])
    found = torch.tensor([[[0, 1, 1, 1], [2, 2, 0, 5]]])
    logits = torch.nn.functional.one_hot(found, 19).permute(0, 3, 1, 2).float()
    score = Segmentation().score(lambda _: {"out": logits}, [(torch.zeros(1, 3, 2, 4), truth)], data)
    assert score["miou"] == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert score["accuracy"] == pytest.approx(5 / 6)


def test_masks_follow_their_images(cityscapes):
    """Roads are grey and skies blue, wherever chance puts them."""
    data = cityscapes_data(str(cityscapes), None, crop_options({"crop": [48, 96]}, "default"))
    for index in range(4):
        torch.manual_seed(index)
        image, mask = data.train[index]
        assert (image.shape, mask.shape) == ((3, 48, 96), (48, 96))
        sky = image[:, mask == CLASSES.index("sky")].float().mean(1)
        road = image[:, mask == CLASSES.index("road")].float().mean(1)
        assert sky[2] > sky[0] + 50
        assert abs(road[2] - road[0]) < 30
    whole, mask = data.test[0]
    assert (whole.shape, set(mask.unique().tolist())) <= ((3, 64, 80), {0, 2, 10, 11, 13, 255})


def test_images_are_resized_with_their_masks(cityscapes):
    data = cityscapes_data(str(cityscapes), 32, crop_options({}, "none"))
    image, mask = data.test[1]
    assert (image.shape, mask.shape, data.input_shape) == ((3, 32, 40), (32, 40), (3, 32, 40))


@pytest.fixture
def damaged(cityscapes, tmp_path):
    shutil.copytree(cityscapes, tmp_path / "data")
    return tmp_path / "data"


def mask_of(folder):
    return next((folder / "gtFine" / "val").rglob("*_labelIds.png"))


def test_what_is_wrong_with_a_folder_is_said(damaged, tmp_path):
    def opened(folder=damaged):
        return cityscapes_data(str(folder), None, crop_options({}, "default"))

    Image.fromarray(np.full((10, 20), 7, np.uint8)).save(mask_of(damaged))
    with pytest.raises(UnsupportedError, match=r"labelIds\.png: expected the size of its image, 64×80, received 10×20"):
        opened().test[0]
    Image.fromarray(np.full((64, 80), 40, np.uint8)).save(mask_of(damaged))
    with pytest.raises(UnsupportedError, match="expected ids from 0 to 33, as in Cityscapes' labelIds, received 40"):
        opened().test[0]
    Image.new("RGB", (80, 64)).save(mask_of(damaged))
    with pytest.raises(UnsupportedError, match="expected a mask, one id per pixel, received an image of mode RGB"):
        opened().test[0]
    mask_of(damaged).unlink()
    with pytest.raises(UnsupportedError, match=r"_leftImg8bit\.png: expected its mask at .*_labelIds.png, found none"):
        opened()
    shutil.rmtree(damaged / "leftImg8bit" / "train")
    (damaged / "leftImg8bit" / "train").mkdir()
    with pytest.raises(UnsupportedError, match=r"train: expected images CITY/NAME_leftImg8bit\.png, found none"):
        opened()
    with pytest.raises(UnsupportedError, match="expected a folder as Cityscapes has it"):
        opened(tmp_path)


class Strided(torch.nn.Conv2d):
    """Wants sides of a multiple of 32, as networks of segmentation_models_pytorch do."""

    def __init__(self, num_classes, stride=1):
        super().__init__(3, num_classes, 3, stride=stride, padding=1)

    def forward(self, images):
        if images.shape[-1] % 32:
            raise RuntimeError(f"expected a width\nof a multiple of 32, received {images.shape[-1]}")
        return super().forward(images)


class Measuring(Strided):
    """Asks for a value, which no run of shapes alone has."""

    def forward(self, images):
        assert float(images.sum()) < 1e9
        return torch.nn.Conv2d.forward(self, images)


def test_a_network_that_fails_on_whole_images_is_refused_before_training(cityscapes, short):
    for net, size, reason in (
        (Strided(19), None, "expected a width of a multiple of 32, received 80"),
        (Strided(19), 128, None),
        (Strided(19, stride=2), 128, "its logits are 64×80"),
        (Measuring(19), None, None),
    ):
        data = cityscapes_data(str(cityscapes), size, crop_options({"crop": [32, 64]}, "none"))
        if reason is None:
            Segmentation().check_network(net, data, "own:Net")
            continue
        with pytest.raises(
            UnsupportedError, match=rf"own:Net: does not take test images of \d+×\d+, .*: {reason}; give"
        ):
            Segmentation().check_network(net, data, "own:Net")
    values = {"task": "segmentation", "data": str(cityscapes), "augmentation_args": {"crop": [32, 64]}}
    config = short(**values, architecture=f"{__name__}:Strided")
    with pytest.raises(UnsupportedError, match="test images of 64×80"):
        build(config, Segmentation().open_data(config))


def test_options_are_checked(short):
    task = Segmentation()
    for given, text in (
        ({"mixup": 0.2}, "mixup: segmentation has no such option; expected 0.0, received 0.2"),
        ({"augmentation": "rand-m9"}, "augmentation: expected one of default, none, flip, crop, received 'rand-m9'"),
        ({"augmentation_args": {"corp": [2, 2]}}, "unknown option 'corp'; did you mean 'crop'"),
        ({"augmentation_args": {"crop": [0, 4]}}, "crop: expected two numbers"),
        ({"augmentation_args": {"scale": [2, 1]}}, "scale: expected .least, largest., received .2, 1."),
    ):
        with pytest.raises(UnsupportedError, match=text):
            task.check(short(task="segmentation", **given))
