"""Folders with one folder per class, read by worker processes."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from foldconv.errors import UnsupportedError
from foldconv.lab.data import create_data, evaluation_loader, training_loader

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create")
SIZE = 16


@pytest.fixture
def folder(tmp_path):
    """Ten images per split; that of number n has the grey level 20·n, of cats in the upper half only."""
    place = tmp_path / "set"
    for split in ("train", "val"):
        for n in range(10):
            path = place / split / ("cat" if n % 2 else "dog") / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((24, 30, 3), 20 * n, np.uint8)
            pixels[:, :15, 0] = 255  # a left half that a flip moves
            Image.fromarray(pixels).save(path)
    return place


def created(folder, **options):
    return create_data(str(folder), image_size=SIZE, **options)


def numbers(images):
    """Which images these are, by their grey level."""
    return ((images[:, 2, 0, 0] * 0.225 + 0.406) * 255 / 20).round().int().tolist()


def test_evaluation_sees_the_middle_in_order(folder):
    data = created(folder)
    assert (data.classes, data.num_classes, data.input_shape) == (("cat", "dog"), 2, (3, SIZE, SIZE))
    ((images, labels),) = evaluation_loader(data)
    assert labels.tolist() == [0] * 5 + [1] * 5
    assert numbers(images) == [1, 3, 5, 7, 9, 0, 2, 4, 6, 8]
    assert images.dtype == torch.float32
    red = images[5, 0] * 0.229 + 0.485
    torch.testing.assert_close(red[:, :7], torch.ones(SIZE, 7))  # the border is in the middle
    torch.testing.assert_close(red[:, 9:], torch.zeros(SIZE, 7), atol=1e-6, rtol=0)


def epoch_of(data, epoch=0, seed=0, **options):
    return [(images, labels) for images, labels in training_loader(data, 4, seed, lambda: epoch, **options)]


def test_training_depends_on_seed_and_epoch_alone(folder):
    data = created(folder)
    first = epoch_of(data)
    torch.rand(5)
    np.random.rand(5)
    for again in (epoch_of(data), epoch_of(data, workers=2)):
        assert all(torch.equal(a, b) for one, two in zip(first, again) for a, b in zip(one, two))
    other, seeded = epoch_of(data, epoch=1), epoch_of(data, seed=1)
    assert not torch.equal(first[0][0], other[0][0])
    assert not torch.equal(first[0][0], seeded[0][0])
    assert sorted(numbers(torch.cat([images for images, _ in first]))) == list(range(10))


def test_reading_leaves_the_global_generators_alone(folder):
    data = created(folder)
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    epoch_of(data)
    assert (torch.rand(1), np.random.rand()) == expected


def test_workers_go_on_with_the_next_epoch(folder):
    data, epochs = created(folder), iter([0, 0, 1, 1])
    loader = training_loader(data, 4, 0, lambda: next(epochs), workers=1)
    for epoch in range(2):
        found = list(loader)
        assert torch.equal(found[0][0], epoch_of(data, epoch=epoch)[0][0])


def test_processes_share_an_epoch(folder):
    data = created(folder)
    whole = epoch_of(data)
    shares = [list(training_loader(data, 2, 0, lambda: 0, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]  # the last two images are one for each: too few for batch norm
    for step in range(2):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), whole[step][0])


@pytest.mark.parametrize(("augmentation", "flips", "crops"), [("none", 0, 0), ("flip", 1, 0), ("crop", 0, 1)])
def test_augmentations(folder, augmentation, flips, crops):
    data = created(folder, augmentation=augmentation)
    left_red = [
        bool(image[0, 0, 0] > image[0, 0, -1])
        for epoch in range(4)
        for images, _ in epoch_of(data, epoch)
        for image in images
    ]
    widths = {
        int((image[0] > 1.9).sum(1).max())
        for epoch in range(4)
        for images, _ in epoch_of(data, epoch)
        for image in images
    }
    if augmentation != "crop":
        assert (not all(left_red)) == bool(flips)
    assert (len(widths) > 2) == bool(crops)


def spoil(folder, *names):
    for name in names:
        path = folder / name
        path.write_bytes(path.read_bytes()[:70])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_ends_the_run_with_its_path(folder, workers):
    spoil(folder, "train/cat/3.png")
    with pytest.raises(
        UnsupportedError, match=r"train/cat/3.png: expected an image, received .*corrupt_images"
    ) as told:
        epoch_of(created(folder), workers=workers)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_left_out_and_counted(folder, workers):
    spoil(folder, "train/cat/3.png", "train/cat/5.png", "val/dog/2.png")
    (folder / "val/dog/4.png").write_text("no image")
    data = created(folder, corrupt_images="skip")
    assert data.images_skipped == 0
    for _ in range(2):  # counted once each
        found = epoch_of(data, workers=workers)
        assert [len(images) for images, _ in found] == [4, 4, 2]
        assert sorted(numbers(torch.cat([images for images, _ in found]))) == [0, 1, 2, 4, 6, 7, 7, 7, 8, 9]
        assert data.images_skipped == 2
    ((images, labels),) = evaluation_loader(data, workers=workers)
    assert numbers(images) == [1, 3, 5, 7, 9, 0, 6, 8]
    assert len(labels) == 8
    assert data.images_skipped == 4
    assert any(path.endswith("val/dog/4.png") for path in data.skipped)


def test_a_missing_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nowhere: expected a folder with train/ and val/, found no such folder"
    ):
        create_data(str(tmp_path / "nowhere"))


def test_a_folder_without_splits(folder):
    shutil.move(folder / "val", folder / "later")
    with pytest.raises(UnsupportedError, match=r"expected the folders train/ and val/ .* found later, train"):
        created(folder)


def test_empty_class_folders_are_named(folder):
    (folder / "train" / "cow").mkdir()
    (folder / "train" / "ape").mkdir()
    (folder / "train" / "ape" / "notes.txt").write_text("no image")
    with pytest.raises(UnsupportedError, match="train: expected images in each class folder, found none in ape, cow;"):
        created(folder)


def test_no_class_folder(folder):
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    with pytest.raises(UnsupportedError, match="val: expected one folder per class"):
        created(folder)


def test_splits_with_other_classes(folder):
    shutil.move(folder / "val" / "dog", folder / "val" / "dogs")
    with pytest.raises(
        UnsupportedError, match=r"same classes in train/ and val/, found dog \(train only\), dogs \(val"
    ):
        created(folder)


def test_a_folder_has_its_own_test_images(folder):
    with pytest.raises(UnsupportedError, match=r"set: holdout: for MNIST, CIFAR and .npz files only; leave it out"):
        create_data(str(folder), holdout=True)
