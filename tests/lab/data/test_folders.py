"""Folders with one folder per class, read by worker processes."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from foldconv.errors import UnsupportedError
from foldconv.lab.data import create_data, evaluation_loader, training_loader
from foldconv.lab.data.folders import image_files, read_rgb

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
def test_corrupt_images_are_left_out_and_counted(folder, workers, caplog):
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
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4
    assert any(
        "val/dog/4.png: left out: expected an image, received a file of no known format" in each for each in told
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_corrupt_images(folder, workers):
    spoil(folder, *(f"{split}/{'cat' if n % 2 else 'dog'}/{n}.png" for split in ("train", "val") for n in range(10)))
    data = created(folder, corrupt_images="skip")
    with pytest.raises(UnsupportedError, match=r"\d.png: expected an image.*; nor can the 9 images before it be used"):
        epoch_of(data, workers=workers)
    with pytest.raises(UnsupportedError, match="set: expected images, and none could be read; replace them"):
        list(evaluation_loader(data, workers=workers))


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


def pixels(path):
    return np.asarray(read_rgb(str(path)))


def test_16_bits_are_scaled_exactly(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for name in ("grey.png", "grey.tif", "grey.pgm"):
        if name.endswith("pgm"):
            (tmp_path / name).write_bytes(b"P5 256 256 65535\n" + levels.astype(">u2").tobytes())
        else:
            Image.fromarray(levels).save(tmp_path / name)
        found = pixels(tmp_path / name)
        assert found.shape == (256, 256, 3)
        for channel in range(3):
            assert np.array_equal(found[..., channel], np.round(levels / 257))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_8_bits_are_read_as_they_are(tmp_path, mode):
    dark = np.zeros((4, 6, 3), np.uint8)
    dark[:, 3:] = 255 if mode in ("1", "L", "LA") else (255, 0, 255)
    image = Image.fromarray(dark).convert(mode)
    if mode.endswith("A"):
        image.putalpha(0)  # the colours below are seen
    image.save(
        tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), **({"transparency": b"\0\1"} if mode == "P" else {})
    )
    assert np.array_equal(pixels(next(tmp_path.iterdir())), dark)


def test_an_image_is_upright_and_the_first_of_several(tmp_path):
    ramp = np.arange(24, dtype=np.uint8).reshape(4, 6)
    exif = Image.Exif()
    exif[274] = 6  # what a camera held upright writes: a quarter turn to the right
    Image.fromarray(ramp).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "turned.png")[..., 0], np.rot90(ramp, -1))
    Image.fromarray(ramp).save(tmp_path / "damaged.png", exif=b"Exif\0\0MM\0*\0\0")
    assert np.array_equal(pixels(tmp_path / "damaged.png")[..., 0], ramp)
    Image.fromarray(ramp).save(tmp_path / "moving.png", save_all=True, append_images=[Image.fromarray(255 - ramp)])
    assert np.array_equal(pixels(tmp_path / "moving.png")[..., 0], ramp)


@pytest.mark.parametrize(
    ("dtype", "tags", "mode"), [(np.float32, {}, "F"), (np.int32, {}, "I"), (np.uint16, {262: 0}, "I;16")], ids=str
)
def test_a_mode_without_a_range_is_refused(folder, dtype, tags, mode):
    (folder / "train" / "cat" / "1.png").unlink()
    Image.fromarray(np.full((20, 20), 0.5).astype(dtype)).save(folder / "train/cat/1.tif", tiffinfo=tags)
    reason = f"expected an image, received mode {mode}, whose black and white are not known; save it with 8 bits"
    with pytest.raises(UnsupportedError, match=f"train/cat/1.tif: {reason}"):
        epoch_of(created(folder))


def contents(good):
    """File names and what is wrong with the file."""
    return {
        "empty.png": (b"", "a file of no known format"),
        "text.JPG": (b"no image", "a file of no known format"),
        "cut.jpeg": (good[: len(good) // 2], ".*truncated"),
        "two\nlines \udcff é.png": (b"", "a file of no known format"),
    }


def test_each_unreadable_file_is_told_in_one_line(tmp_path, monkeypatch):
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "good.jpg")
    for name, (content, reason) in contents((tmp_path / "good.jpg").read_bytes()).items():
        place = tmp_path / "set"
        for split in ("train", "val"):
            (place / split / "cat").mkdir(parents=True)
            (place / split / "cat" / name).write_bytes(content)
        with pytest.raises(UnsupportedError, match=rf"expected an image, received {reason}.*; replace it, or") as told:
            list(evaluation_loader(created(place)))
        assert str(told.value).isprintable()
        assert name.isprintable() == (name in str(told.value))
        shutil.rmtree(place)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(UnsupportedError, match=r"received Image size .4096 pixels. exceeds limit of 3000"):
        read_rgb(str(tmp_path / "good.jpg"))
    Image.new("L", (1, 2000)).save(tmp_path / "thin.png")
    with pytest.raises(UnsupportedError, match="received 1×2000 pixels, too thin to be resized; cut it"):
        read_rgb(str(tmp_path / "thin.png"))
    os.symlink("nowhere.png", tmp_path / "broken.png")
    with pytest.raises(UnsupportedError, match=r"received .*No such file"):
        read_rgb(str(tmp_path / "broken.png"))


def test_what_systems_put_beside_images_is_nothing(folder):
    expected = created(folder)
    image = folder / "train" / "cat" / "1.png"
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "cat/.ipynb_checkpoints", "cat/__MACOSX/cat"):
        (folder / "train" / name).mkdir(parents=True)
        shutil.copy(image, folder / "train" / name)
    for name in ("._1.png", ".DS_Store", "cat/._1.png", "cat/.DS_Store", "cat/notes.txt", "1.png"):
        (folder / "train" / name).write_bytes(b"no image")
    for level, place in enumerate((folder / "train" / "cat", folder / "train", folder)):
        os.symlink(place, folder / "train" / "cat" / f"up {level}")  # would be followed forty times
    found = created(folder)
    assert (found.classes, found.train._files) == (expected.classes, expected.train._files)
    assert found.note.endswith(": passed over what is not called an image: 1 .txt; photos among them: save as .jpg")


def test_photos_of_other_formats_are_not_passed_over_without_a_word(folder, caplog):
    for name in ("train/cat/a.HEIC", "train/dog/b.heic", "val/cat/c.gif", "val/cat/README"):
        (folder / name).write_bytes(b"photo")
    others = "passed over what is not called an image: 2 .heic, 1 without ending, 1 .gif; photos among them: save as"
    assert created(folder).note == f"{folder}: {others} .jpg"
    assert f"; {folder / 'train'}: passed over what is not called an image: 2 .heic; " in created(folder / "train").note
    assert len(image_files(str(folder))) == 20
    assert [record.getMessage() for record in caplog.records] == [f"{folder}: {others} .jpg"]


def test_files_are_in_the_order_of_torchvision(folder):
    from torchvision.datasets import ImageFolder

    image = folder / "train" / "cat" / "1.png"
    for name in ("b", "b/c", "b-c", "B"):
        (folder / "train" / "cat" / name).mkdir(parents=True)
        shutil.copy(image, folder / "train" / "cat" / name / "É.PNG")
    os.symlink(image, folder / "train" / "dog" / "2 linked.png")
    assert created(folder).train._files == ImageFolder(folder / "train").samples


def test_a_listing_is_never_stale(folder):
    assert len(created(folder).train) == 10
    times = os.stat(folder / "train")
    shutil.copy(folder / "train/cat/1.png", folder / "train/cat/11.png")
    (folder / "train/dog/2.png").rename(folder / "train/dog/22.png")
    os.utime(folder / "train", ns=(times.st_atime_ns, times.st_mtime_ns))
    names = [os.path.basename(path) for path, _ in created(folder).train._files]
    assert names == [f"{n}.png" for n in (1, 11, 3, 5, 7, 9, 0, 22, 4, 6, 8)]


def test_a_folder_that_cannot_be_read(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UnsupportedError, match="train/dog: expected a folder to read, received: Permission denied"):
        created(folder)


def test_without_a_size_a_folder_has_224_pixels(folder):
    data = create_data(str(folder))
    ((images, _),) = evaluation_loader(data)
    assert images.shape[1:] == data.input_shape == (3, 224, 224)


def test_other_names_of_the_test_split(folder):
    for name in ("valid", "validation", "test"):
        (each for each in folder.iterdir() if each.name != "train").__next__().rename(folder / name)
        assert numbers(next(iter(evaluation_loader(created(folder))))[0]) == [1, 3, 5, 7, 9, 0, 2, 4, 6, 8]


def test_one_folder_is_split_by_class_and_always_the_same(folder):
    whole = created(folder)
    (folder / "train" / "dog" / "0.png").unlink()
    data, again = created(folder / "train", split=0.4), created(folder / "train", split=0.4)
    assert data.classes == whole.classes
    train, test = ([data._files for data in (each.train, each.test)] for each in (data, again))
    assert train == test
    train, test = (dict(each._files) for each in (data.train, data.test))
    assert not train.keys() & test.keys()
    assert len(train | test) == 9
    assert list(test.values()) == [0, 0, 1, 1]  # 2 of 5 cats, 1.6 of 4 dogs
    assert data.note.endswith("of 9 images in 2 classes, 4 test (split: 0.4 of each class, always the same)")
    assert not whole.note
    for share, counts in ((0.01, [0, 1]), (0.99, [0, 0, 0, 0, 1, 1, 1])):  # each class is in both
        assert [label for _, label in created(folder / "train", split=share).test._files] == counts
    (folder / "val" / "cat").rename(folder / "train" / "later")
    for file in sorted((folder / "train" / "later").iterdir())[1:]:
        file.unlink()
    with pytest.raises(UnsupportedError, match="two images at least of each class to split, found one of later"):
        created(folder / "train")
    shutil.rmtree(folder / "val")
    for name in ("training", "testing"):  # splits by other names are no classes
        shutil.copytree(folder / "train", folder / name)
    shutil.rmtree(folder / "train")
    with pytest.raises(UnsupportedError, match=r"expected the folders train/ and val/ .* found testing, training"):
        created(folder)
