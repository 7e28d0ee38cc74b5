"""Each recipe in configs/ is one that `foldconv train` takes: its network exists and its method applies to it."""

from pathlib import Path

import pytest
import torch

import foldconv
from foldconv import zoo
from foldconv.methods import method_from_json
from foldconv.train import TrainConfig
from foldconv.train.data import list_data
from foldconv.train.optimizers import create_optimizer, create_schedule, training_groups

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))


def test_there_are_recipes():
    assert {"digits", "mnist-pytorch", "cifar10-resnet20"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_recipe_can_be_trained(path):
    config = TrainConfig.load(path)
    assert config.data in (*list_data(), "imagenet")
    with torch.device("meta"):
        net = zoo.create(config.architecture, **config.architecture_args)
        method = method_from_json({"method": config.method, **config.method_args})
        patterns = {"include": config.include, "exclude": config.exclude}
        rich = foldconv.expand(net, method, init=config.init, **patterns)
    assert len(list(rich.parameters())) > len(list(net.parameters()))
    groups = training_groups(rich, config.weight_decay, config.lr, config.stem_lr_factor, config.bias_lr_factor)
    optimizer = create_optimizer(groups, config)
    create_schedule(optimizer, config, steps=100 * config.epochs)
    assert optimizer.param_groups[0]["lr"] <= config.lr  # at the first step; a warm-up begins below
