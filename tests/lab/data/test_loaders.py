"""The split is fixed, the order depends on seed and epoch alone."""

import pytest
import torch
from torch.utils.data import TensorDataset

from foldconv.errors import UnsupportedError
from foldconv.lab.data import EpochShuffle, ImageData, epoch_seed, evaluation_loader, training_loader
from foldconv.lab.train import create_data


def test_digits_are_split_once_and_for_all():
    first, second = create_data("digits"), create_data("digits")
    images, labels = first.test.tensors
    assert torch.equal(images, second.test.tensors[0])
    assert images.shape == (360, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() == 1
    assert labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]  # stratified
    together = torch.cat([first.train.tensors[0], images]).flatten(1)
    assert len(together) == 1797
    # No scan is on both sides (scans that are equal pixel by pixel do not exist in this set).
    assert len(together.unique(dim=0)) == 1797


def test_unknown_data_gives_the_nearest():
    with pytest.raises(UnsupportedError, match="unknown data set 'digit'; did you mean 'digits'"):
        create_data("digit")


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        torch.rand(3)  # the global generator has no say
        return list(EpochShuffle(50, seed, lambda: epoch))

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert sorted(order(1, 2)) == list(range(50))


def test_neighbouring_seeds_share_no_epoch():
    assert len({epoch_seed(seed, epoch) for seed in range(20) for epoch in range(-1, 300)}) == 20 * 301


def tiny(count):
    return ImageData("tiny", TensorDataset(torch.arange(count)), TensorDataset(torch.arange(count)), 2, (1, 1, 1))


@pytest.mark.parametrize(("count", "sizes"), [(9, [4, 4]), (10, [4, 4, 2]), (8, [4, 4])])
def test_no_batch_of_a_single_image(count, sizes):
    loader = training_loader(tiny(count), 4, seed=0, epoch=lambda: 0)
    assert [len(batch) for (batch,) in loader] == sizes
    assert len(loader) == len(sizes)


def test_test_images_come_all_and_in_order():
    assert torch.cat([batch for (batch,) in evaluation_loader(tiny(300))]).tolist() == list(range(300))
