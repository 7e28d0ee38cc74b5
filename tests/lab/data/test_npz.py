"""Sets in .npz files: what they become, and what is said about files with something wrong in them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from foldconv.errors import UnsupportedError
from foldconv.lab.data import create_data, evaluation_loader, training_loader
from foldconv.lab.data.npz import read_npz

RANDOM = np.random.default_rng(0)


def keras(count=60, shape=(6, 6), classes=3):
    return {
        "x_train": RANDOM.integers(0, 256, (count, *shape), dtype=np.uint8),
        "y_train": (np.arange(count) % classes).astype(np.uint8),
        "x_test": RANDOM.integers(0, 256, (count // 6, *shape), dtype=np.uint8),
        "y_test": (np.arange(count // 6) % classes).astype(np.uint8),
    }


def saved(tmp_path, **arrays):
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    return str(path)


def test_grey_images_are_normalized_by_the_training_images(tmp_path):
    arrays = keras()
    data = create_data(saved(tmp_path, **arrays))
    assert (data.num_classes, data.input_shape, data.classes) == (3, (1, 6, 6), None)
    mean, std = arrays["x_train"].mean() / 255, arrays["x_train"].std() / 255
    images, labels = next(iter(evaluation_loader(data)))
    expected = torch.from_numpy((arrays["x_test"] / 255 - mean) / std).float().unsqueeze(1)
    torch.testing.assert_close(images, expected)
    assert images.dtype == torch.float32
    assert labels.tolist() == arrays["y_test"].tolist()
    assert labels.dtype == torch.int64


def test_colour_images_become_channels_first_with_a_mean_per_channel(tmp_path):
    arrays = keras(shape=(6, 6, 3))
    arrays["y_train"] = arrays["y_train"].reshape(-1, 1)  # as Keras has CIFAR's
    data = create_data(saved(tmp_path, **arrays), augmentation="none")
    assert data.input_shape == (3, 6, 6)
    images = torch.cat([images for images, _ in training_loader(data, 7, 0, lambda: 0)])
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=0.03, rtol=0)  # four images are left out
    together = next(iter(training_loader(data, 60, 0, lambda: 0)))[0]
    torch.testing.assert_close(together.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_hold_out_tests_on_the_last_training_images(tmp_path):
    arrays = keras()
    path = saved(tmp_path, **arrays)
    data = create_data(path, holdout=True, normalize=False)
    assert (len(data.train), len(data.test)) == (50, 10)
    images, labels = next(iter(evaluation_loader(data)))
    torch.testing.assert_close(images, torch.from_numpy(arrays["x_train"][50:] / 255).float().unsqueeze(1))
    assert labels.tolist() == arrays["y_train"][50:].tolist()
    assert len(create_data(path, holdout=7).test) == 7
    with pytest.raises(UnsupportedError, match="hold out fewer images than there are, received holdout=60 of 60"):
        create_data(path, holdout=60)


def test_image_size_scales_the_shorter_side_and_keeps_the_middle(tmp_path):
    arrays = keras(shape=(4, 12))
    arrays["x_train"][:] = 10
    arrays["x_train"][:, :, 4:8] = 200
    data = create_data(saved(tmp_path, **arrays), image_size=4)
    assert data.input_shape == (1, 4, 4)
    assert data.train.tensors[0].unique().tolist() == [200]
    assert create_data(saved(tmp_path, **arrays), image_size=8).input_shape == (1, 8, 8)


WRONG = {
    "no labels": (lambda a: a.pop("y_test"), "no y_test in this file, which has x_test, x_train, y_train; expected"),
    "encoded images": (
        lambda a: [a.update({f"jpeg_{split}": a.pop(f"x_{split}")}) for split in ("train", "test")],
        "no x_train, x_test in this file, which has y_test, y_train; .* save pixels so, not encoded images",
    ),
    "floats": (lambda a: a.update(x_train=a["x_train"] / 255), "x_train: expected uint8 pixels, received float64"),
    "channels first": (
        lambda a: a.update(x_train=np.zeros((4, 3, 8, 8), np.uint8)),
        r"x_train: expected images of shape .* received uint8 of shape \(4, 3, 8, 8\); put the channels last",
    ),
    "shapes": (lambda a: a.update(x_test=a["x_test"][:, :5]), r"one shape, received \(1, 6, 6\) for .* \(1, 5, 6\)"),
    "label count": (lambda a: a.update(y_train=a["y_train"][1:]), r"y_train: expected 60 whole numbers.*shape \(59,\)"),
    "label kind": (lambda a: a.update(y_test=a["y_test"] * 0.5), "y_test: expected 10 whole numbers.*float64"),
    "high label": (
        lambda a: a.update(y_test=a["y_test"] + 1),
        r"y_test: expected labels from 0 to 2, received 3 for image 2 \(3 such labels\)",
    ),
    "negative label": (lambda a: a.update(y_train=a["y_train"].astype(int) - 1), "received -1 for image 0"),
    "named classes": (lambda a: a.update(classes=np.array(["a", "b"])), "expected labels from 0 to 1, received 2"),
    "odd names": (lambda a: a.update(classes=np.arange(3)), "classes: expected one text per class, received int64"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_line(tmp_path, change, message):
    arrays = keras()
    change(arrays)
    with pytest.raises(UnsupportedError, match=message) as told:
        create_data(saved(tmp_path, **arrays))
    assert "\n" not in str(told.value)
    assert "set.npz" in str(told.value)


def test_a_truncated_file(tmp_path):
    path = saved(tmp_path, **keras())
    content = Path(path).read_bytes()
    for share in (0.0, 0.3, 0.99):
        with open(path, "wb") as file:
            file.write(content[: int(share * len(content))])
        with pytest.raises(UnsupportedError, match=r"set.npz: expected an .npz file .* damaged or truncated") as told:
            create_data(path)
        assert "\n" not in str(told.value)


def test_a_damaged_byte(tmp_path):
    path = saved(tmp_path, **keras())
    content = bytearray(Path(path).read_bytes())
    content[500] ^= 255
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(UnsupportedError, match="damaged or truncated"):
        create_data(path)


def test_pickled_objects_are_never_read(tmp_path):
    with pytest.raises(UnsupportedError, match="pickled objects, which could run code"):
        create_data(saved(tmp_path, **keras() | {"y_train": np.array([{}] * 60, dtype=object)}))


def test_neither_a_missing_file_nor_another_format(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.npz: expected a data set \(.npz\), found no such file"):
        create_data(str(tmp_path / "none.npz"))
    with open(tmp_path / "single.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UnsupportedError, match="received a single array"):
        create_data(str(tmp_path / "single.npz"))


def test_a_file_is_read_again_only_when_it_changed(tmp_path):
    arrays = keras()
    path = saved(tmp_path, **arrays)
    assert read_npz(path) is read_npz(path)
    arrays["x_train"][:] = 7
    saved(tmp_path, **arrays, classes=np.array(["a", "b", "c"]))
    assert read_npz(path).train_images.unique().tolist() == [7]


def test_class_names_that_are_no_text_are_refused(tmp_path):
    pixels, labels = np.zeros((2, 4, 4), np.uint8), np.zeros(2, int)
    for names in (np.array([0x110001], "<u4").view("<U1"), np.array([b"\xff"])):
        np.savez(tmp_path / "a.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels, classes=names)
        with pytest.raises(UnsupportedError, match="classes: expected one text per class, received what is no Unicode"):
            read_npz(tmp_path / "a.npz")
