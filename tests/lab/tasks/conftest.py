"""Small data in the formats of Cityscapes and COCO, and runs on them that tests look at."""

import importlib.util
import io
from pathlib import Path

import pytest
from rich.console import Console

from foldconv.lab.train import TrainConfig, fit

ROOT = Path(__file__).parents[3]
SHORT = {"epochs": 2, "batch_size": 2, "lr": 0.001, "accelerator": "cpu", "threads": 1, "keep": 2}


def written(folder, kind):
    """The data of one format."""
    spec = importlib.util.spec_from_file_location("make_small_data", ROOT / "examples" / "make_small_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, kind)(folder / kind, {"train": 4, "val": 2}, height=64, width=80)
    return folder / kind


@pytest.fixture(scope="session")
def cityscapes(tmp_path_factory):
    return written(tmp_path_factory.mktemp("data"), "cityscapes")


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    return written(tmp_path_factory.mktemp("data"), "coco")


@pytest.fixture
def silent():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def short():
    """Make a config of a small run."""
    return lambda **settings: TrainConfig.from_dict({**SHORT, **settings})


@pytest.fixture(scope="session")
def segmented(cityscapes, tmp_path_factory):
    """The folder of a finished segmentation, expanded in the backbone, and its result."""
    folder = tmp_path_factory.mktemp("runs") / "segmented"
    chosen = {"include": "backbone.*", "stem_lr_factor": 0.1, "augmentation_args": {"crop": [32, 64]}}
    values = {**SHORT, "task": "segmentation", "data": str(cityscapes), "out": str(folder), **chosen}
    return folder, fit(TrainConfig.from_dict(values), Console(file=io.StringIO()))


@pytest.fixture(scope="session")
def detected(coco, tmp_path_factory):
    """The folder of a finished detection, expanded as a whole, and its result."""
    pytest.importorskip("faster_coco_eval")
    folder = tmp_path_factory.mktemp("runs") / "detected"
    values = {**SHORT, "task": "detection", "data": str(coco), "out": str(folder), "image_size": 64}
    return folder, fit(TrainConfig.from_dict(values), Console(file=io.StringIO()))
