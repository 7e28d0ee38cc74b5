"""The recipes of OREPA's COCO and Cityscapes tables run: a step each, on small data, in their own networks."""

import pytest
import torch
from torch import nn

from foldconv.errors import CheckpointError
from foldconv.lab.recipes import __path__ as folders
from foldconv.lab.train import TrainConfig, fit, open_network
from foldconv.lab.train.checkpoint import start_backbone_from
from foldconv.lab.train.config import read_yaml
from foldconv.lab.train.optimizers import create_schedule
from foldconv.network.tree import foldable_layers

RECIPES = ["coco_faster_rcnn", "coco_retinanet", "cityscapes_pspnet", "cityscapes_deeplabv3plus"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs(recipe, request, silent, tmp_path, monkeypatch):
    values = read_yaml(f"{next(iter(folders))}/orepa/{recipe}.yaml")
    kind = "coco" if values["task"] == "detection" else "cityscapes"
    small = {"data": str(request.getfixturevalue(kind)), "out": str(tmp_path / "run"), "workers": 0, "epochs": 1}
    small |= {"batch_size": 2, "accelerator": "cpu", "threads": 1, "warmup_epochs": 0, "lr": 1e-4, "keep": 1}
    # A network of 24 million parameters takes its time to be measured; two blocks of it show that the method applies.
    small["include"] = [values["include"].replace("*", part) for part in ("conv1", "layer4.2.*")]
    if kind == "cityscapes":
        pytest.importorskip("segmentation_models_pytorch")
        small["augmentation_args"] = {"crop": [64, 64]}
    else:
        pytest.importorskip("faster_coco_eval")
        small["image_size"] = 64
    monkeypatch.setattr("foldconv.lab.train.experiment._finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(TrainConfig.from_dict({**values, **small}), silent)
    net, description = open_network(tmp_path / "run")
    start = "backbone.body" if kind == "coco" else "encoder"
    assert {f"{start}.conv1", f"{start}.layer4.2.conv2"} <= foldable_layers(net).keys()
    assert description["task"] == values["task"]


def test_poly_falls_by_its_power(short):
    config = short(schedule="poly", schedule_args={"power": 0.9, "final": 0.01}, lr=0.5, epochs=10)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule, rates = create_schedule(optimizer, config, 10), []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[::5] == pytest.approx([0.5, 0.5 * (0.01 + 0.99 * 0.5**0.9), 0.005])


def test_a_classifier_starts_a_backbone():
    def body():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    classifier = nn.Sequential(*body(), nn.Linear(4, 10))
    net = nn.ModuleDict({"head": nn.Conv2d(4, 2, 1), "backbone": nn.ModuleDict({"body": body()})})
    head = net["head"].weight.clone()
    assert start_backbone_from(net, classifier.state_dict(), "run") == "backbone.body."
    assert torch.equal(net["backbone"]["body"][0].weight, classifier[0].weight)
    assert torch.equal(net["head"].weight, head)
    with pytest.raises(
        CheckpointError, match="expected the weights of this network, or of a classifier that is its back"
    ):
        start_backbone_from(net, nn.Linear(3, 4).state_dict(), "run")
