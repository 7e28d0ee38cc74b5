"""What a config accepts, and the command that it stands for."""

import pytest

from foldconv import ops
from foldconv.errors import UnsupportedError
from foldconv.lab.bench.config import PATHS, BenchConfig
from foldconv.lab.cli import parse
from foldconv.lab.cli._bench import config_of


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"what": ("stp",)}, "what: unknown value 'stp'; did you mean 'step'?"),
        ({"path": ("auto", "algebra")}, "path: unknown value 'algebra'; expected one of: auto, gpu, cpu, blocks, "),
        ({"composition": ("features",)}, "composition: unknown value 'features'; did you mean 'feature'?"),
        ({"device": "gpu"}, "device: unknown value 'gpu'"),
        ({"steps": 0}, "steps: expected a number ≥ 1, received 0"),
        ({"batch": (0,)}, r"batch: expected numbers ≥ 1, received \[0\]"),
        ({"methods": ("dbb", "dbb")}, "methods: expected one or more values, each once"),
        ({"methods": ()}, "methods: expected one or more values"),
        ({"clock": "cpu", "device": "cuda"}, "clock: a GPU's work is no time of the process"),
        ({"clock": "gpu"}, "clock: unknown value 'gpu'"),
        ({"batch": (1, 2, 3), "size": (8, 16)}, "taken in pairs, received 3 and 2 values"),
    ],
)
def test_wrong_values_are_refused(given, message):
    with pytest.raises(UnsupportedError, match=message):
        BenchConfig("resnet18", **given)


def test_every_path_can_be_asked_for():
    assert set(PATHS) == {"auto", *ops.paths()}


def test_the_recorded_command_gives_the_same_config():
    config = BenchConfig(
        "resnet18", (8, 32), (224, 64), ("doconv:depth_multiplier=12", "orepa"), ("step", "eval"), 3, ("auto", "cpu"),
        composition=("kernel", "feature"), channels_last=True, clock="cpu",
    )  # fmt: skip
    options = parse(config.command("a.json").split()[1:])
    assert options.out == "a.json"
    assert config_of(options) == config


def test_absolute_paths_stay_on_the_machine():
    assert BenchConfig().command("/home/someone/a.json") == "foldconv bench resnet18 --out a.json"
