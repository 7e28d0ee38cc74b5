"""Networks and data of the user's own, by name: trained, resumed, evaluated, folded; never by a file's word alone."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from foldconv.errors import CheckpointError, UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.cli import main
from foldconv.lab.data import ImageData
from foldconv.lab.importing import imported
from foldconv.lab.train import TrainConfig, fit, open_network, resume
from foldconv.lab.train.building import build

SOURCE = """
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Module):
    def __init__(self, num_classes=7, width=4, channels=2):
        super().__init__()
        print("built")
        self.features = nn.Sequential(nn.Conv2d(channels, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)
    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))

def with_channels(in_channels, **options):
    import own_parts
    return Net(channels=in_channels, **options)

class Data(pl.LightningDataModule):
    num_classes = 3
    def setup(self, stage):
        labels = torch.arange(30) % 3
        noise = torch.randn(30, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        self.images = TensorDataset(noise + labels.view(-1, 1, 1, 1), labels)
    def train_dataloader(self): return DataLoader(self.images)
    def val_dataloader(self): return DataLoader(self.images)

def wrong(num_classes): return nn.Conv2d(2, num_classes, 1)
def nothing(): return 3

class Maps(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, num_classes, 3, padding=1))
    def forward(self, images):
        return {"out": super().forward(images)}
"""
SILENT = Console(file=io.StringIO())
OWN = {"data": "own_code:Data", "architecture": "own_code:Net", "epochs": 3, "batch_size": 10, "accelerator": "cpu"}


@pytest.fixture(autouse=True)
def beside(tmp_path, monkeypatch):
    """The working directory has a module, which no path names."""
    (tmp_path / "own_code.py").write_text(SOURCE)
    (tmp_path / "own_parts.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    yield
    sys.modules.pop("own_code", None)
    sys.modules.pop("own_parts", None)


def printed(capsys):
    """The result, behind what the user's code prints."""
    text = capsys.readouterr().out
    return json.loads(text[text.index("{") :])


def test_own_network_and_data_through_the_command_line(capsys, tmp_path):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in OWN.items()]
    assert main(["train", *words, "--architecture-args", "width=6", "--method=repvgg", "--out=run", "--json"]) == 0
    result = printed(capsys)
    assert result["architecture"] == "own_code:Net"
    assert result["max_output_difference"] < 1e-5

    # A file's word is not enough, since it names code that would run.
    sys.modules.pop("own_code")
    for command in (
        ["eval", "run"],
        ["fold", "run", "out.safetensors"],
        ["export", "run", "net.pt2"],
        ["inspect", "run"],
    ):
        assert main(command) == 1
        text = capsys.readouterr()
        assert "names 'own_code:Net' as its network, whose code would run; if you trust it, give" in text.err
        assert "built" not in text.out + text.err
        assert "own_code" not in sys.modules
    trust = ["--architecture", "own_code:Net"]
    assert main(["eval", "run", *trust, "--data", "own_code:Data", "--json"]) == 0
    found = printed(capsys)
    assert found["accuracy"] == result["accuracy_expanded"]
    assert main(["fold", "run", "out.safetensors", *trust]) == 0
    assert main(["export", "run", "net.pt2", *trust]) == 0
    network, description = open_network("out.safetensors", "own_code:Net")
    assert network.features[0].out_channels == 6
    assert description["architecture_args"]["width"] == 6
    with pytest.raises(CheckpointError, match="names 'own_code:Net'"):
        open_network("out.safetensors", trusted="own_code:Other")


def test_a_run_is_resumed_with_it():
    fit(TrainConfig(**OWN, out="run"), SILENT)
    whole = torch.load("run/last.ckpt", weights_only=True)["state_dict"]
    os.replace("run/previous.ckpt", "run/last.ckpt")
    sys.modules.pop("own_code")
    resume("run", SILENT)
    again = torch.load("run/last.ckpt", weights_only=True)["state_dict"]
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_methods_are_compared_on_it(capsys):
    """Each run is a process of its own, which has to find the module beside where the user stands."""
    for number, colour in enumerate(("red", "green", "blue") * 4):
        Path("images", colour).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(f"images/{colour}/{number}.png")
    words = ["--architecture=own_code:Net", "--architecture-args", "channels=3", "--data=images", "--image-size=16"]
    words += ["--split=0.5", "--epochs=1", "--batch-size=6", "--accelerator=cpu", "--methods=plain,repvgg"]
    assert main(["compare", *words, "--seeds=1", "--jobs=2", "--out=compared", "--json"]) == 0
    report = printed(capsys)
    assert report["title"].startswith("own_code:Net on images")
    for method in ("plain", "repvgg"):
        assert main(["eval", f"compared/{method}/seed-0", "--architecture=own_code:Net", "--json"]) == 0
        assert report["methods"][method]["accuracies"]["0"] == pytest.approx(100 * printed(capsys)["accuracy"])


def test_other_tasks_have_other_outputs():
    data = ImageData("maps", [], [], 5, (3, 8, 8))
    config = TrainConfig(architecture="own_code:Maps", task="segmentation", accelerator="cpu", batch_size=10)
    assert type(build(config, data)[0][0]).__name__ == "DOConv2d"


def test_what_is_no_network_for_the_data(tmp_path):
    assert zoo.create("own_code:with_channels", in_channels=5, width=3).features[0].weight.shape == (3, 5, 3, 3)
    assert zoo.create("own_code:Net", in_channels=5).features[0].in_channels == 2
    for name, message in (
        ("own_code:Missing", "own_code:Missing: expected a class or function that can be imported"),
        ("no_such_module:Net", "no_such_module:Net: expected a class or function that can be imported"),
        ("own_code:nothing", "own_code:nothing: expected a torch.nn.Module from it, received int"),
        ("own_code:OWN", "expected a class or function that can be imported"),
        (
            "own_code:wrong",
            r"logits of shape \(2, 3\) for images of shape \(2, 2, 8, 8\), received \(2, 3, 8,",
        ),
    ):
        with pytest.raises(UnsupportedError, match=message):
            fit(TrainConfig(**{**OWN, "architecture": name, "out": "run"}), SILENT)
    with pytest.raises(UnsupportedError, match="Net': unknown option 'widht'; did you mean 'width'"):
        fit(TrainConfig(**OWN, architecture_args={"widht": 3}, out="run"), SILENT)
    with pytest.raises(UnsupportedError, match=r"does not take images of shape .*--architecture-args"):
        fit(TrainConfig(**OWN, architecture_args={"channels": 3}, out="run"), SILENT)
    assert not (tmp_path / "run").exists()
    assert imported("own_code:Net").__name__ == "Net"
