"""Sets that torchvision reads, as small files in its layouts; nothing is downloaded."""

import dataclasses
import hashlib
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from foldconv.errors import UnsupportedError
from foldconv.lab import recipes
from foldconv.lab.data import create_data, evaluation_loader, list_data, training_loader
from foldconv.lab.train import TrainConfig

RANDOM = np.random.default_rng(0)
CONFIGS = Path(recipes.__file__).parent


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_mnist(folder, name="MNIST", count=12):
    (folder / name / "raw").mkdir(parents=True)
    images = {}
    for split, number in (("train", count), ("t10k", count // 3)):
        images[split] = RANDOM.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        labels = (np.arange(number) % 10).astype(np.uint8)
        (folder / name / "raw" / f"{split}-images-idx3-ubyte").write_bytes(idx(images[split]))
        (folder / name / "raw" / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return images


def write_cifar(folder, monkeypatch, classes=10, each=4):
    """Small batches; torchvision is told their checksums, which it compares before it unpickles anything."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    place = folder / kind.base_folder
    place.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"
    pixels, sums = {}, {}
    for name in [name for name, _ in kind.train_list + kind.test_list]:
        pixels[name] = RANDOM.integers(0, 256, (each, 3072), dtype=np.uint8)
        labels = [i % classes for i in range(each)]
        (place / name).write_bytes(pickle.dumps({"data": pixels[name], key: labels}))
    (place / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: [f"c{i}" for i in range(classes)]}))
    for file in place.iterdir():
        sums[file.name] = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums[kind.meta["filename"]]})
    return pixels


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_is_read_and_normalized_as_published(tmp_path, name, folder):
    images = write_mnist(tmp_path, folder)
    data = create_data(name, folder=tmp_path, download=False)
    assert (data.num_classes, data.input_shape, len(data.train), len(data.test)) == (10, (1, 28, 28), 12, 4)
    mean, std = {"mnist": (0.1307, 0.3081), "fashion-mnist": (0.2860, 0.3530)}[name]
    batch, labels = next(iter(evaluation_loader(data)))
    torch.testing.assert_close(batch, torch.from_numpy((images["t10k"] / 255 - mean) / std).float().unsqueeze(1))
    assert labels.tolist() == [0, 1, 2, 3]
    first, second = (next(iter(training_loader(data, 12, 0, lambda: 0)))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not data.transform.flip
    assert not data.transform.pad


def test_the_protocol_of_the_mnist_demonstration(tmp_path):
    images = write_mnist(tmp_path)
    config = TrainConfig.load(CONFIGS / "mnist-pytorch.yaml")
    data = dataclasses.replace(config, data_folder=str(tmp_path)).open_data()
    assert (len(data.train), len(data.test)) == (8, 4)  # of 60,000 and 10,000 images: 50,000 and 10,000
    batch, _ = next(iter(evaluation_loader(data)))
    torch.testing.assert_close(batch, torch.from_numpy(images["train"][8:] / 255).float().unsqueeze(1))
    same = create_data("mnist", folder=tmp_path, normalize=False, holdout=4)
    assert torch.equal(batch, next(iter(evaluation_loader(same)))[0])


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, monkeypatch, classes):
    pixels = write_cifar(tmp_path, monkeypatch, classes)
    data = create_data(f"cifar{classes}", folder=tmp_path, download=False)
    assert (data.num_classes, data.input_shape) == (classes, (3, 32, 32))
    assert len(data.train) == (20 if classes == 10 else 4)
    assert data.classes[:2] == ("c0", "c1")
    assert data.transform.flip
    assert data.transform.pad == 4
    images, labels = data.test.tensors
    assert np.array_equal(images.numpy().reshape(4, -1), pixels["test_batch" if classes == 10 else "test"])
    assert labels.tolist() == [0, 1, 2, 3]


def test_cifar_is_not_unpickled_unless_its_checksum_is_the_published_one(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 4}))
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(UnsupportedError, match=r"expected the data set cifar10, received: .*corrupted"):
        create_data("cifar10", folder=tmp_path, download=False)


def test_a_missing_set_says_where_and_what_to_do(tmp_path):
    place = tmp_path / "nowhere"
    with pytest.raises(UnsupportedError, match=r"nowhere: expected the data set mnist, .* put mnist.npz there") as told:
        create_data("mnist", folder=place, download=False)
    assert "allow the download" in str(told.value)
    assert not place.exists()


@pytest.mark.parametrize("name", ["mnist", "cifar100"])
def test_a_download_that_fails_is_one_line(tmp_path, name):
    with pytest.raises(UnsupportedError, match=f"expected the data set {name}, received: .*no network here") as told:
        create_data(name, folder=tmp_path)
    assert "\n" not in str(told.value)


def test_a_truncated_file_of_torchvision_is_one_line(tmp_path):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UnsupportedError, match="expected the data set mnist") as told:
        create_data("mnist", folder=tmp_path, download=False)
    assert "\n" not in str(told.value)


def test_an_npz_file_in_the_folder_comes_first(tmp_path):
    train, test = RANDOM.integers(0, 256, (2, 6, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=train, y_train=np.arange(6), x_test=test, y_test=np.arange(6))
    data = create_data("mnist", folder=tmp_path)
    assert data.transform.mean == (0.1307,)
    assert np.array_equal(data.test.tensors[0].squeeze(1), test)


def test_a_set_is_read_once(tmp_path, monkeypatch):
    from torchvision import datasets

    write_mnist(tmp_path)
    first = create_data("mnist", folder=tmp_path)
    monkeypatch.delattr(datasets, "MNIST")
    monkeypatch.setattr(datasets, "MNIST", None, raising=False)
    second = create_data("mnist", folder=tmp_path, augmentation="flip")
    assert second.train.tensors[0].data_ptr() == first.train.tensors[0].data_ptr()
    assert second.transform.flip


def test_names():
    assert list_data() == ["cifar10", "cifar100", "digits", "fashion-mnist", "mnist"]
    with pytest.raises(UnsupportedError, match="unknown data set 'cifar-10'; did you mean 'cifar10'"):
        create_data("cifar-10")
    with pytest.raises(UnsupportedError, match=r"digits: holdout: for MNIST, CIFAR and .npz files only"):
        create_data("digits", holdout=True)
    with pytest.raises(UnsupportedError, match=r"digits: normalize: for MNIST, CIFAR and .npz files only"):
        create_data("digits", normalize=False)
    with pytest.raises(UnsupportedError, match="image_size: expected a number of pixels ≥ 1, received 0"):
        create_data("digits", image_size=0)
    with pytest.raises(UnsupportedError, match="corrupt_images: expected one of error, skip, received 'ignore'"):
        create_data("digits", corrupt_images="ignore")


def test_torchvisions_advice_is_left_out(tmp_path):
    with pytest.raises(UnsupportedError, match=r"received: Dataset not found or corrupted\.; put cifar10\.npz there"):
        create_data("cifar10", folder=tmp_path / "nowhere", download=False)
