"""Augmentation of whole batches, and how an epoch is shared: against what torchvision does image by image."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.transforms import functional

from foldconv.errors import UnsupportedError
from foldconv.lab.data import BatchTransform, ImageData, create_data, evaluation_loader, training_loader

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (103, 3, 16, 16), dtype=np.uint8))
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def colour(count=103, **options):
    transform = BatchTransform(MEAN, STD, **({"flip": True, "pad": 2} | options))
    dataset = TensorDataset(IMAGES[:count], torch.arange(count))
    return ImageData("colour", dataset, dataset, count, (3, 16, 16), transform=transform)


def batches(data, size=8, seed=0, epoch=0, **options):
    return list(training_loader(data, size, seed, lambda: epoch, **options))


@pytest.mark.parametrize(("flip", "pad"), [(True, 2), (True, 0), (False, 3), (False, 0)])
def test_a_batch_is_what_torchvision_makes_of_each_image(flip, pad):
    transform = BatchTransform(MEAN, STD, flip=flip, pad=pad)
    draws = transform.draw(len(IMAGES), torch.Generator().manual_seed(0))
    found = transform(IMAGES, draws)
    rows = [[0, pad, pad]] * len(IMAGES) if draws is None else draws.tolist()
    for image, (mirrored, top, left), result in zip(IMAGES, rows, found):
        image = functional.crop(functional.pad(image, [pad]), top, left, 16, 16)
        image = functional.hflip(image) if mirrored else image
        expected = functional.normalize(image / 255, MEAN, STD)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_every_choice_is_drawn_equally_often():
    draws = BatchTransform(MEAN, STD, flip=True, pad=4).draw(90_000, torch.Generator().manual_seed(0))
    assert abs(float(draws[:, 0].float().mean()) - 0.5) < 0.01
    for column in (1, 2):
        counts = draws[:, column].bincount()
        assert len(counts) == 9
        assert (counts - 10_000).abs().max() < 500
    assert not BatchTransform(pad=4).draw(50, torch.Generator())[:, 0].any()


def test_evaluation_is_not_augmented():
    (images, _), *_ = evaluation_loader(colour())
    torch.testing.assert_close(images, functional.normalize(IMAGES / 255, MEAN, STD), atol=1e-5, rtol=1e-5)


def test_augmentation_depends_on_seed_and_epoch_alone():
    first = batches(colour())
    torch.rand(3)
    assert all(torch.equal(a, b) for one, two in zip(first, batches(colour())) for a, b in zip(one, two))
    # The same image is another one in each epoch and run.
    looks = [
        images[labels == 5].flatten().tolist()
        for seed, epoch in [(0, 0), (0, 1), (0, 2), (1, 0)]
        for images, labels in batches(colour(pad=8), seed=seed, epoch=epoch)
        if 5 in labels
    ]
    assert len({tuple(look) for look in looks}) == len(looks) == 4


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_have_what_one_has(world_size):
    whole = batches(colour(), size=8)
    shares = [batches(colour(), size=8 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    for step, (images, labels) in enumerate(whole[:12]):  # those that are full
        assert torch.equal(torch.cat([share[step][0] for share in shares]), images)
        assert torch.equal(torch.cat([share[step][1] for share in shares]), labels)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("count", [103, 64, 5])
def test_evaluation_is_shared_without_loss(world_size, count, monkeypatch):
    monkeypatch.setattr("foldconv.lab.data.loaders.EVALUATION_BATCH", 16)
    shares = [list(evaluation_loader(colour(count), rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    labels = [labels for share in shares for _, labels in share]
    assert sorted(torch.cat(labels).tolist()) == list(range(count))
    assert max(map(len, labels)) <= 16
    assert min(map(len, labels)) >= 1


@pytest.mark.parametrize(("limit", "home"), [(2**30, "meta"), (10, "cpu")])
def test_a_set_too_large_for_the_device_stays_in_memory(limit, home, monkeypatch):
    monkeypatch.setattr("foldconv.lab.data.loaders.ON_DEVICE", limit)
    loader = evaluation_loader(colour(), device="meta")
    (images, _), *_ = loader
    assert images.device.type == "meta"
    assert images.shape == IMAGES.shape
    assert loader._begin._tensors[0].device.type == home


def test_digits_can_be_augmented_and_resized():
    data = create_data("digits", image_size=16, augmentation="crop")
    assert data.input_shape == (1, 16, 16)
    assert data.transform.pad == 2
    images, _ = batches(data, size=64)[0]
    assert images.shape == (64, 1, 16, 16)
    assert images.min() == -1
    plain, _ = batches(create_data("digits", image_size=16), size=64)[0]
    assert not torch.equal(images, plain)


def test_an_unknown_augmentation_gives_the_nearest():
    with pytest.raises(UnsupportedError, match="unknown augmentation 'flip-crops'; did you mean 'flip-crop'"):
        create_data("digits", augmentation="flip-crops")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batches():
    for (images, labels), (there, labels_there) in zip(batches(colour()), batches(colour(), device="cuda")):
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), images, atol=1e-6, rtol=1e-6)
        assert torch.equal(labels_there.cpu(), labels)
