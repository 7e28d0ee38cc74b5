"""A data module of the user's own: its datasets, the run's order."""

import sys

import pytest
import torch

from foldconv.errors import UnsupportedError
from foldconv.lab.data import create_data, evaluation_loader, training_loader

SOURCE = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

class Images(Dataset):
    classes = ["a", "b", "c"]
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def __getitem__(self, i): return torch.full((2, 4, 4), float(i)) + torch.rand(1) / 10, i % 3

class Module(pl.LightningDataModule):
    def __init__(self, data_dir="unset", size=12):
        super().__init__()
        self.data_dir, self.size, self.calls = data_dir, size, []
    def prepare_data(self): print("prepared in", self.data_dir)
    def setup(self, stage): print("set up for", stage)
    def train_dataloader(self): return DataLoader(Images(self.size), batch_size=5, shuffle=True)
    def val_dataloader(self): return DataLoader(Images(6), batch_size=5)

class Tested(Module):
    def test_dataloader(self): return DataLoader(Images(4))

class Bare(Module):
    def train_dataloader(self): return [1, 2]

class Whole(Module):
    def train_dataloader(self): return DataLoader([(torch.zeros(2, 4, 4, dtype=torch.uint8), 0)] * 4)

class Unnamed(Module):
    def train_dataloader(self): return DataLoader([(torch.zeros(2, 4, 4), 0)] * 4)

class Growing(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.zeros(1, 4 + i // 4, 4), 0

class Sizes(Module):
    num_classes = 2
    def train_dataloader(self): return DataLoader(Growing())

class Mixed(Sizes):
    def train_dataloader(self): return DataLoader([(torch.zeros(1, 4 + i, 4), 0) for i in range(4)])

class Plain: pass
number = 3
"""


@pytest.fixture(autouse=True)
def beside(tmp_path, monkeypatch):
    (tmp_path / "own_sets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_sets", None)
    assert str(tmp_path) not in sys.path


def test_its_datasets_are_used_in_the_order_of_the_run(capsys):
    data = create_data("own_sets:Module", folder="there")
    assert capsys.readouterr().out == "prepared in there\nset up for fit\n"
    assert (data.num_classes, data.classes, data.input_shape) == (3, ("a", "b", "c"), (2, 4, 4))
    first, again, other = (list(training_loader(data, 4, 0, lambda e=e: e)) for e in (0, 0, 1))
    assert all(torch.equal(a, b) for one, two in zip(first, again) for a, b in zip(one, two))
    assert not torch.equal(first[0][0], other[0][0])
    assert sorted(int(image[0, 0, 0]) for images, _ in first for image in images) == list(range(12))
    ((_, labels),) = evaluation_loader(data)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_test_loader_is_preferred_and_nothing_is_prepared_without_download(capsys):
    data = create_data("own_sets:Tested", download=False)
    assert capsys.readouterr().out == "set up for fit\nset up for test\n"
    assert len(data.test) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_set:Module", "own_set:Module: expected a class that can be imported, received: No module named"),
        ("own_sets:Modul", "received: module 'own_sets' has no attribute 'Modul'"),
        ("own_sets:Plain", "expected a LightningDataModule, received the class Plain"),
        ("own_sets:number", "expected a LightningDataModule, received a int"),
        ("own_sets:Bare", "train_dataloader: expected a DataLoader over a dataset with a length, received list"),
        ("own_sets:Whole", r"expected batches of float32 images .* received torch.uint8 \(2, 2, 4, 4\)"),
        (
            "own_sets:Mixed",
            r"one shape in a batch, received \(1, 4, 4\) for image 0 and \(1, 5, 4\) for image 1; resize",
        ),
        ("own_sets:Unnamed", "expected num_classes, or classes, on the module or its dataset, found neither"),
    ],
)
def test_what_is_wrong_is_said(name, message):
    with pytest.raises(UnsupportedError, match=message) as told:
        create_data(name)
    assert "\n" not in str(told.value)


def test_resizing_is_the_modules_affair():
    with pytest.raises(UnsupportedError, match="image_size: expected none with a data module, received 8"):
        create_data("own_sets:Module", image_size=8)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_images_of_other_sizes_in_a_batch_are_told(workers):
    data = create_data("own_sets:Sizes")
    message = (
        r"^own_sets:Sizes: expected images of one shape .* \(1, [45], 4\) for image \d and \(1, [45], 4\) for image \d"
    )
    with pytest.raises(UnsupportedError, match=message) as told:
        list(training_loader(data, 8, 0, lambda: 0, workers=workers))
    assert "\n" not in str(told.value)
