"""The recipes of OREPA's COCO and Cityscapes tables run: a step each, on small data, in their own networks."""

import pytest
import torch
from torch import nn

import foldconv
from foldconv.errors import CheckpointError
from foldconv.lab import zoo
from foldconv.lab.data import training_loader
from foldconv.lab.recipes import __path__ as folders
from foldconv.lab.train import TrainConfig
from foldconv.lab.train.building import start_backbone_from
from foldconv.lab.train.classification import task_of
from foldconv.lab.train.config import read_yaml
from foldconv.lab.train.optimizers import configured_groups, create_optimizer, create_schedule
from foldconv.network.tree import foldable_layers

RECIPES = ["coco_faster_rcnn", "coco_retinanet", "cityscapes_pspnet", "cityscapes_deeplabv3plus"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_its_network(recipe, request):
    """A step and an evaluation on small images; that the method applies to the whole, tests of all recipes show."""
    values = read_yaml(f"{next(iter(folders))}/orepa/{recipe}.yaml")
    kind = "coco" if values["task"] == "detection" else "cityscapes"
    pytest.importorskip("faster_coco_eval" if kind == "coco" else "segmentation_models_pytorch")
    small = {"image_size": 64} if kind == "coco" else {"augmentation_args": {"crop": [64, 64]}}
    small |= {"data": str(request.getfixturevalue(kind)), "lr": 1e-4}
    config = TrainConfig.from_dict({**values, **small})
    task = task_of(config.task)
    task.check(config)
    data = task.open_data(config)
    net = zoo.create(config.architecture, **task.options(config, data), **config.architecture_args)
    part, _, last = config.include.removesuffix(".*").rpartition(".")
    above = net.get_submodule(part)
    ends = ["conv1", "layer4.2.conv2"]  # the stem, with a rate of its own, and a block: copying all of it takes long
    setattr(above, last, foldconv.expand(getattr(above, last), config.method, include=ends, init=config.init))
    assert len(foldable_layers(net)) == 2
    module = task.module(net, config, data)
    optimizer = create_optimizer(configured_groups(net, config), config)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-4, 1e-4 * config.stem_lr_factor}
    images, targets = next(iter(training_loader(data, 2, seed=0, epoch=lambda: 0)))
    before = net.get_submodule(f"{config.include.removesuffix('.*')}.conv1").weight.detach().clone()
    minimized, _, _ = module(images, targets)
    minimized.backward()
    optimizer.step()
    assert not torch.equal(net.get_submodule(f"{config.include.removesuffix('.*')}.conv1").weight, before)
    with torch.no_grad():
        found = task.score(net.eval(), [(images, targets)], data)
    assert 0 <= found[task.measure] <= 1


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
    with pytest.raises(CheckpointError, match="expected the weights of this network, or of a classifier"):
        start_backbone_from(net, nn.Linear(3, 4).state_dict(), "run")
