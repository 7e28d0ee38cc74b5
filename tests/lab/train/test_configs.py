"""Each recipe is one that `foldconv train` takes: its network exists and its method applies to it."""

from pathlib import Path

import pytest
import torch

import foldconv
from foldconv.lab import recipes, zoo
from foldconv.lab.data import list_data
from foldconv.lab.data.augmentation import check_augmentation, check_for_folders_only, image_options
from foldconv.lab.train import TrainConfig
from foldconv.lab.train.classification import task_of
from foldconv.lab.train.config import PLAIN, read_yaml
from foldconv.lab.train.optimizers import configured_groups, create_optimizer, create_schedule
from foldconv.methods import method_from_json

ROOT = Path(recipes.__file__).parent
FILES = sorted(ROOT.rglob("*.yaml"))
RECIPES = [path for path in FILES if not path.name.startswith("_")]


def name(path):
    return path.relative_to(ROOT).as_posix()


def test_there_are_recipes_of_every_paper():
    found = {name(path) for path in RECIPES}
    assert {"digits.yaml", "mnist-pytorch.yaml", "cifar10-resnet20.yaml"} <= found  # documents name them
    expected = {"gluoncv/plain18.yaml", "gluoncv/resnext50_32x4d.yaml"}
    expected |= {f"gluoncv/mobilenet_v{version}.yaml" for version in (1, 2, 3)}
    expected |= {f"gluoncv/resnet{d}_{v}.yaml" for d in (18, 34, 50, 101, 152) for v in ("v1", "v1b", "v2")}
    orepa = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50", "resnet18_1.5x", "resnet18_2x")
    expected |= {f"orepa/{each}.yaml" for each in (*orepa, "repvgg_a0", "repvgg_a1", "repvgg_a2")}
    orepa = ("coco_faster_rcnn", "coco_retinanet", "cityscapes_pspnet", "cityscapes_deeplabv3plus")
    expected |= {f"orepa/{each}.yaml" for each in orepa}
    expected |= {f"repvgg/{each}.yaml" for each in ("a0", "a1", "a2", "b0", "b1", "b2", "b3")}
    expected |= {"g_resnext/g_resnext50.yaml", "g_resnext/g_resnext101.yaml", "cifar/cifar_quick.yaml"}
    expected |= {f"cifar/resnet{depth}.yaml" for depth in (32, 56, 110)}
    expected |= {"expandnets/3x3.yaml", "expandnets/7x7.yaml", "mnist/tensorflow.yaml", "mnist/gluon.yaml"}
    assert expected <= found


def test_every_file_says_where_it_is_from():
    assert all(path.read_text(encoding="utf-8").startswith("# ") for path in FILES)


def test_every_common_file_has_users():
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    for common in set(FILES) - set(RECIPES):
        users = [path for path in common.parent.glob("*.yaml") if f"base: {common.name}\n" in texts[path]]
        assert len(users) > 1, common


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_recipe_can_be_trained(path):
    config = TrainConfig.load(path)
    # docs/evidence.py cuts the sets of shortened recipes out.
    in_memory = config.data.partition(":")[0] in list_data() or path.parent.name == "shortened"
    assert in_memory or config.data == {"detection": "coco", "segmentation": "cityscapes"}.get(config.task, "imagenet")
    task_of(config.task).check(config)
    if config.task == "classification":
        check_augmentation(config.augmentation)
        image_options(config.augmentation_args, config.augmentation)
    if config.architecture.startswith("smp/"):
        pytest.importorskip("segmentation_models_pytorch")
    if in_memory:
        check_for_folders_only(config.data, config.augmentation, config.augmentation_args)
    with torch.device("meta"):
        net = rich = zoo.create(config.architecture, **config.architecture_args)
        if config.method != PLAIN:
            method = method_from_json({"method": config.method, **config.method_args})
            rich = foldconv.expand(net, method, init=config.init, include=config.include, exclude=config.exclude)
            assert len(list(rich.parameters())) > len(list(net.parameters()))
    groups = configured_groups(rich, config)
    assert sum(len(group["params"]) for group in groups) == len(list(rich.parameters()))
    optimizer = create_optimizer(groups, config)
    create_schedule(optimizer, config, steps=100 * config.epochs)
    assert optimizer.param_groups[0]["lr"] <= config.lr  # at the first step; a warm-up begins below


@pytest.mark.parametrize(
    ("recipe", "doubled", "decayed"),
    [
        # Parameters with 'bias' in their names in the originals, and what of ours decays beyond kernels.
        ("orepa/resnet18", 21, "scales"),
        ("repvgg/b1", 80, "kernels"),
        ("cifar/cifar_quick", 11, "all"),
    ],
)
def test_rates_and_decay_are_those_of_the_code(recipe, doubled, decayed):
    config = TrainConfig.load(ROOT / f"{recipe}.yaml")
    with torch.device("meta"):
        net = zoo.create(config.architecture, **config.architecture_args)
        rich = foldconv.expand(net, config.method, init=config.init, exclude=config.exclude)
    groups = configured_groups(rich, config)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(rich.named_parameters())
    twice = {name for name, parameter in named.items() if rate[id(parameter)] == 2 * config.lr}
    assert twice == {name for name in named if "bias" in name}
    assert len(twice) == doubled
    free = {name for name, parameter in named.items() if decay[id(parameter)] == 0}
    scales = {name for name in named if name.rpartition(".")[2].startswith("vector")}
    assert config.decay == decayed
    assert bool(free) == (decayed != "all")
    assert bool(scales) == (decayed == "scales")
    assert not scales & free


# The arguments in the command lines of GluonCV's model zoo, where GPUs times images are the batch.
PUBLISHED = {
    "resnet18_v1": {"lr": 0.4, "epochs": 120, "decay": "all", "batch_size": 256 * 4},
    "resnet34_v1b": {
        "lr": 0.4,
        "epochs": 120,
        "decay": "all",
        "batch_size": 256 * 4,
        "architecture_args": {"last_gamma": True},
    },
    "resnet101_v2": {"lr": 0.4, "epochs": 120, "decay": "all", "batch_size": 128 * 8, "precision": "16-mixed"},
    "resnet152_v1": {
        "lr": 0.1,
        "epochs": 120,
        "batch_size": 32 * 8,
        "architecture_args": {"last_gamma": True},
        "label_smoothing": 0.1,
    },
    "resnext50_32x4d": {
        "lr": 0.4,
        "epochs": 200,
        "batch_size": 128 * 8,
        "precision": "16-mixed",
        "label_smoothing": 0.1,
        "mixup": 0.2,
    },
    "mobilenet_v2": {"lr": 0.05, "epochs": 150, "batch_size": 64 * 4, "weight_decay": 4e-5, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("network", PUBLISHED)
def test_settings_are_those_of_the_published_commands(network):
    config = TrainConfig.load(ROOT / "gluoncv" / f"{network}.yaml")
    same_for_all = {
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "cosine",
        "warmup_epochs": 5.0,
        "augmentation_args": {"color_jitter": 0.4, "lighting": 0.1},
    }
    off = {"decay": "kernels", "precision": "32-true", "label_smoothing": 0.0, "mixup": 0.0, "architecture_args": {}}
    expected = {**same_for_all, **off, **PUBLISHED[network]}
    assert {key: getattr(config, key) for key in expected} == expected


def test_a_recipe_takes_over_what_its_base_says():
    assert "base" not in read_yaml(ROOT / "repvgg" / "b3.yaml")
    config = TrainConfig.load(ROOT / "repvgg" / "b3.yaml")  # from two files, one the other's base
    assert (config.architecture, config.epochs, config.augmentation) == ("plain_repvgg_b3", 200, "original")
    assert (config.method, config.lr, config.batch_size) == ("repvgg", 0.1, 256)
